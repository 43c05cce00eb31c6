"""Which samples a step sees, on which rank, in which micro-batch; and the seed of whatever else is random in it."""

from collections.abc import Iterator

import numpy as np

from beit_fast.train.config import RunConfig
from beit_fast.train.task import Request


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


def accumulation(config: RunConfig, size: int) -> int:
    """Micro-batches per step and device."""
    return -(-(config.batch_size // size) // config.batch_per_device)


def seed_of(*numbers: int) -> int:
    """A 63-bit seed that depends on every number (splitmix64's finaliser, chained)."""
    mask, value = (1 << 64) - 1, 0
    for number in numbers:
        value = (value + number + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value >> 1
