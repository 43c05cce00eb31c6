"""Ratios of two timings on a machine that others use too: measured in turns, and given with an interval."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple


class Speedup(NamedTuple):
    """How many times longer the slower one takes, over interleaved pairs."""

    median: float
    low: float
    """Lower end of the 95 % interval of the median (order statistics; no distribution is assumed)."""
    high: float
    pairs: int


def measure_speedup(
    fast: Callable[[], object],
    slow: Callable[[], object],
    *,
    repeats: int,
    pairs: int = 31,
    clock: Callable[[], float] = time.perf_counter,
) -> Speedup:
    """Times `repeats` calls of `fast` and one of `slow` in turns; returns slow over fast, per call.

    For work of one thread `clock` may be `time.process_time`, which does not count what other processes took.
    """
    if pairs < 15:
        raise ValueError(f"pairs must be at least 15, got {pairs}")
    fast(), slow()
    ratios = []
    for _ in range(pairs):
        start = clock()
        for _ in range(repeats):
            fast()
        middle = clock()
        slow()
        ratios.append((clock() - middle) / ((middle - start) / repeats))
    ratios.sort()
    rank = int(pairs / 2 - 1.96 * pairs**0.5 / 2)  # of the binomial with p = 1/2, by its normal approximation
    return Speedup(median(ratios), ratios[rank - 1], ratios[-rank], pairs)
