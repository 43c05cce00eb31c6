"""What a rank computes in one step: gradients of its micro-batches, then weights. Nothing here waits for the device."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit_fast.train.batching import seed_of
from beit_fast.train.config import RunConfig
from beit_fast.train.cuda_graph import DDP_WARM_UP_STEPS, WARM_UP_STEPS, CapturedStep, make_capturable
from beit_fast.train.distributed import parallel
from beit_fast.train.distributed.world import World
from beit_fast.train.optim import LossScaler, optimizer_step
from beit_fast.train.precision import autocast, precision_of
from beit_fast.train.task import Task


class StepResult(NamedTuple):
    """0-d tensors on the device."""

    loss: Tensor
    """this rank's share"""
    sums: dict[str, Tensor]
    """of this rank, as `StepOutput.sums`"""
    global_loss: Tensor
    norm: Tensor
    """of the gradient before clipping"""
    found_inf: Tensor
    """1 where the step was skipped, because the loss of a rank or the gradient was not finite"""
    searching: Tensor
    """1 where that was to be expected: the scale of fp16 was still being looked for"""


class TrainStep:
    """Steps a model; called with this rank's micro-batches and the number of the step, from 0."""

    def __init__(
        self,
        task: Task,
        config: RunConfig,
        world: World,
        bare: nn.Module,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: LossScaler,
        ema: dict[str, Tensor] | None,
    ) -> None:
        self.task, self.config, self.world = task, config, world
        self.bare, self.model, self.optimizer, self.scaler, self.ema = bare, model, optimizer, scaler, ema
        self.precision = precision_of(config, world.device)
        self.captured: CapturedStep | None = None

    def record_with(self, recorder: Any) -> None:
        """From now on let `recorder` (a `CudaRecorder`) record a step of one micro-batch and launch the recording."""
        make_capturable(self.optimizer, self.world.device)
        warm_up = WARM_UP_STEPS if self.world.size == 1 else DDP_WARM_UP_STEPS
        self.captured = CapturedStep(self._recorded, self.world.device, warm_up, recorder)

    def __call__(self, group: list[Any], step: int) -> StepResult:
        if self.captured is None:
            return self._update(*self.gradients(group, step))
        (batch,) = group
        found: StepResult = self.captured((self._ready(batch, step, 0), self._num_targets(group)))
        return found

    def gradients(self, group: list[Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of the step, averaged over the ranks; this rank's share of the loss, and its sums."""
        num_targets = self._num_targets(group)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.world.device)
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(group):
            ready = self._ready(batch, step, index)
            with parallel.micro_batch(self.model, self.world, last=index == len(group) - 1):
                part, found = self._backward(ready, num_targets)
            loss = loss + part
            sums = {name: value + sums.get(name, 0) for name, value in found.items()}
        return loss, sums

    def _num_targets(self, group: list[Any]) -> Tensor:
        """Of the global batch, divided by the number of ranks."""
        counts = [scalar(self.task.num_targets(batch), self.world.device) for batch in group]
        return (self.world.sum(torch.stack(counts).sum()) / self.world.size).float()

    def _ready(self, batch: Any, step: int, index: int) -> Any:
        """What `Task.loss` takes of micro-batch number `index`; seeds whatever is random in it."""
        torch.manual_seed(seed_of(self.config.seed, step, self.world.rank, index))
        with torch.no_grad():
            return self.task.prepare(batch, step)

    def _backward(self, ready: Any, num_targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and sums of a micro-batch, whose gradients are added to those that are there."""
        with autocast(self.world.device, self.precision):
            output = self.task.loss(self.model, ready, num_targets)
        (output.loss * self.scaler.scale).backward()
        return output.loss.detach(), {name: value.detach() for name, value in output.sums.items()}

    def _update(self, loss: Tensor, sums: dict[str, Tensor]) -> StepResult:
        """Step the optimizer and the averages, unless the loss of any rank or the gradient is not finite."""
        optim = self.config.optim
        total = self.world.sum(loss.clone()) / self.world.size
        norm, found_inf = optimizer_step(self.optimizer, self.scaler.scale, optim.clip_grad, total)
        searching = found_inf * torch.isfinite(total) * (self.scaler.scale > 1)
        self.scaler.update(found_inf)
        if self.ema is not None and optim.ema_decay is not None:
            parallel.average(self.ema, self.bare, (1 - optim.ema_decay) * (1 - found_inf))
        return StepResult(loss, sums, total, norm, found_inf, searching)

    def _recorded(self, inputs: tuple[Any, Tensor]) -> StepResult:
        """The part of a step that a CUDA graph holds."""
        self.optimizer.zero_grad(set_to_none=True)
        return self._update(*self._backward(*inputs))


def scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """A number as 0-d fp64 on the device; filled in there, because copying it would wait for the device."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)
