"""What a rank computes in one step: gradients of its micro-batches, then weights. Nothing here waits for the device."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit_fast.train.cuda_graph import DDP_WARM_UP_STEPS, WARM_UP_STEPS, CapturedStep, make_capturable
from beit_fast.train.distributed import parallel
from beit_fast.train.distributed.world import World
from beit_fast.train.optim import LossScaler, optimizer_step
from beit_fast.train.precision import autocast, precision_of
from beit_fast.train.schedules import seed_of
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
    """Steps a model; called with this rank's micro-batches and the number of the step, from 0.

    Args:
        module: what `Task.build` returned.
        model: what is called in training: the module, or DDP around it.
    """

    def __init__(
        self, task: Task, world: World, module: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer,
        scaler: LossScaler, ema: dict[str, Tensor] | None,
    ) -> None:  # fmt: skip
        self.task, self.config, self.world = task, task.config, world
        self.module, self.model, self.optimizer, self.scaler, self.ema = module, model, optimizer, scaler, ema
        self.autocast = autocast(world.device, precision_of(self.config, world.device))
        self.captured: CapturedStep | None = None
        self.recorded_batch: Any = None
        self.updating = False
        """Whether weights are being changed: an error then leaves them half changed."""

    def record_with(self, recorder: Any) -> None:
        """From now on let `recorder` (a `CudaRecorder`) record a step of one micro-batch and launch the recording."""
        make_capturable(self.optimizer, self.world.device)
        warm_up = WARM_UP_STEPS if self.world.size == 1 else DDP_WARM_UP_STEPS
        self.captured = CapturedStep(self._recorded, self.world.device, warm_up, recorder)

    def __call__(self, batches: list[Any], step: int) -> StepResult:
        if self.captured is None:
            return self._update(*self.gradients(batches, step))
        batch = self._prepare(batches[0], step, 0)
        if self.recorded_batch is None:
            self.recorded_batch = batch
        device = self.world.device
        tensors = {k: v for k, v in vars(batch).items() if isinstance(v, Tensor) and v.device == device}
        result: StepResult = self.captured((tensors, self._num_targets(batches)))
        return result

    def gradients(self, batches: list[Any], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of the step, averaged over the ranks; this rank's share of the loss, and its sums."""
        num_targets = self._num_targets(batches)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.world.device)
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            prepared = self._prepare(batch, step, index)
            if self.world.size > 1:  # reduced over the ranks once per step
                parallel.set_gradient_sync(self.model, index == len(batches) - 1)
            part, part_sums = self._backward(prepared, num_targets)
            loss = loss + part
            for name, value in part_sums.items():
                sums[name] = value + sums[name] if name in sums else value
        return loss, sums

    def _num_targets(self, batches: list[Any]) -> Tensor:
        """Targets of the global batch over the number of ranks, 0-d float32."""
        count = sum(map(self.task.num_targets, batches))
        if not isinstance(count, Tensor):  # filled in on the device: a copy would wait for it
            count = torch.full((), count, dtype=torch.float64, device=self.world.device)
        return (self.world.sum(count.double()) / self.world.size).float()

    def _prepare(self, batch: Any, step: int, index: int) -> Any:
        """What `Task.loss` takes of micro-batch number `index`; seeds whatever is random in it."""
        torch.manual_seed(seed_of(self.config.seed, step, self.world.rank, index))
        with torch.no_grad():
            return self.task.prepare(batch, step)

    def _backward(self, batch: Any, num_targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and sums of a prepared micro-batch; its gradients are added to those that are there."""
        with self.autocast:
            output = self.task.loss(self.model, batch, num_targets)
        (output.loss * self.scaler.scale).backward()
        return output.loss.detach(), output.sums

    def _update(self, loss: Tensor, sums: dict[str, Tensor]) -> StepResult:
        """Step the optimizer and the averages, unless the loss of any rank or the gradient is not finite."""
        optim = self.config.optim
        total = self.world.sum(loss.clone()) / self.world.size
        self.updating = True
        norm, found_inf = optimizer_step(self.optimizer, self.scaler.scale, optim.clip_grad, total)
        searching = found_inf * torch.isfinite(total) * (self.scaler.scale > 1)
        self.scaler.update(found_inf)
        if self.ema is not None and optim.ema_decay is not None:
            parallel.average(self.ema, self.module, (1 - optim.ema_decay) * (1 - found_inf))
        self.updating = False
        return StepResult(loss, sums, total, norm, found_inf, searching)

    def _recorded(self, inputs: tuple[dict[str, Tensor], Tensor]) -> StepResult:
        """The part of a step that a CUDA graph holds; of the batch it reads the tensors on the device."""
        tensors, num_targets = inputs
        self.optimizer.zero_grad(set_to_none=True)
        return self._update(*self._backward(replace(self.recorded_batch, **tensors), num_targets))
