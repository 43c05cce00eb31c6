"""Which samples a step sees, on which rank, in which micro-batch; and the seed of whatever else is random in it."""

from collections.abc import Iterator

import numpy as np

from beit_fast.data.loader import Request
from beit_fast.data.sampling import GOLDEN, shift_right, splitmix64
from beit_fast.train.config import RunConfig


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
    value = np.zeros(1, np.int64)
    for number in numbers:
        value = splitmix64(value + number + GOLDEN)
    return int(shift_right(value, 1)[0])
