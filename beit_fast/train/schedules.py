"""What a step is a function of: its learning rate, its samples, its seed. Nothing to save, nothing to restore."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from beit_fast.data.loader import Request
from beit_fast.data.sampling import GOLDEN, shift_right, splitmix64
from beit_fast.train.config import OptimConfig, RunConfig


def learning_rate(step: int, config: OptimConfig, total_steps: int, warmup_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`, before any layer decay.

    The numbers are those of the official code's per-step arrays: warm-up includes both ends (first step `warmup_lr`,
    last step the peak), so the peak occurs twice, and the minimum is approached but not reached. `poly` is
    mmsegmentation's, in which the official segmentation runs.
    """
    if config.schedule == "poly":
        ratio = config.warmup_lr / config.lr
        factor = 1.0 - (1.0 - step / warmup_steps) * (1.0 - ratio) if step < warmup_steps else 1.0
        return factor * (config.min_lr + (config.lr - config.min_lr) * (1.0 - min(step / total_steps, 1.0)))
    if step < warmup_steps:
        if warmup_steps == 1:
            return config.warmup_lr
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / (warmup_steps - 1)
    done = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    remaining = {"cosine": 0.5 * (1.0 + math.cos(math.pi * done)), "linear": 1.0 - done, "constant": 1.0}
    return config.min_lr + (config.lr - config.min_lr) * remaining[config.schedule]


def run_length(config: RunConfig, num_samples: int) -> tuple[int, int, int]:
    """(steps per epoch, steps of the whole schedule, warm-up steps) for a data set of `num_samples`.

    The last, incomplete batch of an epoch is dropped, as officially. A warm-up that is longer than a short
    run is a tenth of it. ValueError where no step fits.
    """
    steps_per_epoch = num_samples // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"the data holds {num_samples} samples, less than one batch of {config.batch_size}; lower --batch-size"
        )
    total = config.steps if config.steps is not None else round(config.epochs * steps_per_epoch)
    if total < 1:
        raise ValueError(f"the run is {total} steps long; raise --epochs or --steps")
    warmup = config.optim.warmup_steps
    if warmup is None:
        warmup = round(config.optim.warmup_epochs * steps_per_epoch)
    if warmup > total:
        warmup = total // 10
    return steps_per_epoch, total, warmup


def requests_of(
    first_step: int, last_step: int, steps_per_epoch: int, config: RunConfig, rank: int, size: int
) -> Iterator[Request]:
    """The micro-batches of steps [first_step, last_step) that rank `rank` of `size` computes, in order.

    The global batch of a step is a run of positions in the epoch's order; every rank takes a contiguous share, in
    `accumulation` nearly equal parts.
    """
    local = config.batch_size // size
    for step in range(first_step, last_step):
        epoch, within = divmod(step, steps_per_epoch)
        start = within * config.batch_size + rank * local
        for part in np.array_split(np.arange(start, start + local, dtype=np.int64), accumulation(config, size)):
            yield Request(epoch, part)


@dataclass(frozen=True)
class RunSchedule:
    """Where each step of a run stands: its learning rate, its epoch, its samples.

    Args:
        config: of the run.
        num_samples: of its data.
        schedule_offset, data_offset: added to the number of a step to give its place in the schedule, and in the order
            of the data. 0 until the batch size is changed: the run then goes on from the same epoch and, where its
            length is given in epochs, from the same share of the schedule, in steps of the new batch, rounded.
    """

    config: RunConfig
    num_samples: int
    schedule_offset: int = 0
    data_offset: int = 0

    def __post_init__(self) -> None:
        values = zip(("steps_per_epoch", "total", "warmup"), run_length(self.config, self.num_samples), strict=True)
        for name, value in values:
            object.__setattr__(self, name, value)

    steps_per_epoch: int = field(init=False)
    total: int = field(init=False)
    """Steps of the whole schedule."""
    warmup: int = field(init=False)

    @staticmethod
    def after(config: RunConfig, num_samples: int, step: int, state: Mapping[str, Any]) -> "RunSchedule":
        """The schedule of a run that continues after `step`, from the `state` of its checkpoint.

        Raises:
            ValueError: the batch size changes, but the checkpoint does not say what it was.
        """
        schedule, data = state.get("offsets", (0, 0))
        before = state.get("batch_size")
        if before is None and config.change_batch_size:
            raise ValueError(
                "--change-batch-size: this checkpoint was saved by an earlier version, which did not write down its "
                "batch size; continue the run to its next checkpoint with its own --batch-size first"
            )
        if before not in (None, config.batch_size):
            scale = (num_samples // config.batch_size) / (num_samples // before)
            data = round((step + data) * scale) - step
            schedule = round((step + schedule) * scale) - step if config.steps is None else schedule
        return RunSchedule(config, num_samples, schedule, data)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of its place."""
        return {
            "total_steps": self.last, "epoch": int(self.epoch(step)), "batch_size": self.config.batch_size,
            "offsets": [self.schedule_offset, self.data_offset],
        }  # fmt: skip

    @property
    def last(self) -> int:
        """Number of the last step."""
        return self.total - self.schedule_offset

    @property
    def target(self) -> int:
        """Number of the step at which the run ends: the last one, or --max-steps."""
        return min(self.last, self.config.max_steps or self.last)

    def evaluates(self, step: int, target: int) -> bool:
        """Whether a step, before the last one, is one of those to evaluate."""
        every = self.config.eval_every
        return every is not None and step < target and step % every == 0

    def rate(self, step: int) -> float:
        """Learning rate of a step, before any layer decay."""
        return learning_rate(step + self.schedule_offset, self.config.optim, self.total, self.warmup)

    def samples_seen(self, step: int) -> int:
        """Samples before a step; of a run whose batch size was changed, as if it had always been this one."""
        return (step + self.data_offset) * self.config.batch_size

    def epoch(self, step: int) -> float:
        """Epochs before a step."""
        return (step + self.data_offset) / self.steps_per_epoch

    def requests(self, first: int, last: int, rank: int, size: int) -> Iterator[Request]:
        """The micro-batches of steps [first, last) that a rank computes."""
        offset = self.data_offset
        return requests_of(first + offset, last + offset, self.steps_per_epoch, self.config, rank, size)


def accumulation(config: RunConfig, size: int) -> int:
    """Micro-batches per step and device."""
    return -(-(config.batch_size // size) // config.batch_per_device)


def seed_of(*numbers: int) -> int:
    """A 63-bit seed that depends on every number (splitmix64's finaliser, chained)."""
    value = np.zeros(1, np.int64)
    for number in numbers:
        value = splitmix64(value + number + GOLDEN)
    return int(shift_right(value, 1)[0])
