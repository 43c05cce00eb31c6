"""What is trained. A task owns model, data and loss; the engine owns optimizer, clock and disk: `engine.run(task)`.

Calls, in order: `build` once; for every step `num_targets` of each micro-batch, then per micro-batch `prepare` and
`loss`, then `after_step`; at intervals `summarise` and `evaluate`; `finish` after the last step; `close` always.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from beit_fast.data.loader import Request
from beit_fast.data.sources import Contents
from beit_fast.train.config import RunConfig
from beit_fast.train.distributed.world import World
from beit_fast.train.optim import decay_groups


class StepOutput(NamedTuple):
    """What a task computes of one micro-batch."""

    loss: Tensor
    """0-d: the sum over the micro-batch's targets, divided by the `num_targets` that `Task.loss` was given."""
    sums: dict[str, Tensor]
    """0-d, without gradient, e.g. `num_correct`; the same names at every step. They are added over micro-batches, ranks
    and steps on the device; `Task.summarise` sees their totals once per interval."""


class Task:
    """Base class of every task; `build`, `num_samples`, `batches` and `loss` are required, the rest has defaults.

    A batch is a dataclass from `batches` to `loss`. Everything random must be a function of (seed, epoch, sample), or
    be drawn from torch's default generator, which the engine seeds from (seed, step, rank, micro-batch) before
    `prepare` and `loss`. State that changes while training lives in the module that `build` returns (parameters and
    buffers): that is what is saved.
    """

    name: str = "task"
    """Names the run in progress lines and in the run folder."""

    sample_noun: str = "images"
    """Unit of throughput: `images` gives `images_per_s`."""

    can_shard: bool = False
    """Whether FSDP2 may split the module: its parameters are then used in its forward pass only."""

    can_capture: bool = False
    """Whether a CUDA graph may hold `loss`: it depends on its arguments and the module only, looks at no value on the
    host, and `prepare` gives a registered dataclass (or nested tuples) of tensors whose shapes never change."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.alive: Callable[[], None] = lambda: None
        """To be called now and then in `evaluate` and `finish`: no sign of life for half an hour ends the run."""

    def build(self, world: World) -> nn.Module:
        """Open the data, load what is frozen, and return the module to train, on `world.device`, in fp32.

        The engine has just called `torch.manual_seed(config.seed)`.

        Raises:
            ValueError, OSError: the configuration cannot work; one clear line.
        """
        raise NotImplementedError

    def num_samples(self) -> int:
        """Samples in one epoch, once `build` has returned; steps per epoch are `num_samples() // config.batch_size`."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """JSON values that a run and its continuation must share, e.g. fingerprints of data and tokenizer."""
        return {}

    def contents(self) -> dict[str, Contents]:
        """What was found in the data, by what it is for (`training`, ...); asked after `build`."""
        return {}

    def frozen(self) -> list[nn.Module]:
        """What is held beside the module but not trained: a tokenizer, a backbone; asked after `build`."""
        return []

    def batches(self, requests: Iterator[Request]) -> Iterator[Any]:
        """One batch per request, in order, on the device. Read ahead at will; `requests` ends with the run."""
        raise NotImplementedError

    def num_targets(self, batch: Any) -> Tensor | int:
        """Number of terms the loss of this micro-batch sums over: masked patches, or (the default) samples."""
        return len(batch)

    def prepare(self, batch: Any, step: int) -> Any:
        """The batch with what needs no gradient and no autocast, e.g. visual tokens; `step` counts from 0."""
        return batch

    def loss(self, model: nn.Module, batch: Any, num_targets: Tensor) -> StepOutput:
        """Loss of one micro-batch, by calling `model` (it may be wrapped by DDP: call it, once) under autocast.

        Divide the *sum* of the per-target losses by `num_targets` (0-d float: targets in the global batch / world
        size), not by the local count; then results do not depend on how the global batch was split.
        """
        raise NotImplementedError

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups: `params`, `names` (lists), `weight_decay`, and optionally `lr_scale` (layer decay)."""
        return decay_groups(model, weight_decay)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated parts of the module, in order: what --compile compiles and FSDP2 gathers one by one."""
        return list(getattr(model, "blocks", []))

    def after_step(self, model: nn.Module, step: int) -> None:
        """Act after the optimizer's step number `step` (from 0), e.g. update a codebook, on the unwrapped module."""

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics of an interval from the totals of `StepOutput.sums`, units in the names; `loss` is the engine's."""
        return {}

    def counters(self) -> dict[str, float]:
        """Host-side numbers for the metrics line, e.g. `bad_images`; cheap, no device sync."""
        return {}

    def evaluates_start(self) -> bool:
        """Whether to evaluate before the first step, too: what the run starts from."""
        return False

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Held-out metrics of the unwrapped module (in eval mode, under no_grad and autocast); `{}` = there is none."""
        return {}

    def finish(self, model: nn.Module, folder: Path) -> None:
        """Export weights and tables into `folder` after the last step and its evaluation, on rank 0.

        The engine moves them to the run folder. `model` is the unwrapped module with its weights, or their averages
        where the run keeps them.
        """

    def plan(self) -> dict[str, float]:
        """For --dry-run: `flops_per_image` (forward and backward) and, apart, e.g. `tokenizer_flops_per_image`."""
        return {}

    def plan_lines(self) -> list[tuple[str, str]]:
        """For --dry-run: further lines of the plan, a name and a text each."""
        return []

    def close(self) -> None:
        """Stop threads, close files. Called once, also after an error."""
