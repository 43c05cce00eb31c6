"""Blockwise masks for a batch of 128 on a 14 x 14 grid, 75 masked: beit_fast beside the algorithm in plain Python.

pytest benchmarks/bench_mask_sampler.py --benchmark-json benchmarks/records/<date>_<cpu>_mask_sampler.json
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from beit_fast.data.sampling import BlockwiseMasking
from benchmarks.interleaved import measure_speedup
from benchmarks.peers import PythonBlockwiseMasking

BATCH = 128
GRID = (14, 14)
NUM_MASKED = 75

Sampler = Callable[[], NDArray[Any]]  # -> (BATCH, 14, 14), another batch at each call


def compiled(mode: str) -> Sampler:
    masking = BlockwiseMasking(GRID, NUM_MASKED, mode=mode)
    batches = itertools.count()

    def draw() -> NDArray[np.bool_]:
        first = BATCH * next(batches)
        return masking.sample(0, 0, np.arange(first, first + BATCH)).numpy()

    return draw


def python_port() -> Sampler:
    masking = PythonBlockwiseMasking(GRID, NUM_MASKED)
    return lambda: np.stack([masking() for _ in range(BATCH)])


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "beit_fast exact": lambda: compiled("exact"),
    "beit_fast official": lambda: compiled("official"),
    "python port": python_port,
}


def check_statistics(draw: Sampler, exact: bool) -> None:
    """What is timed must be BEiT's masks: counts and coverage of the official sampler over 5120 of them."""
    masks = np.concatenate([draw() for _ in range(40)])
    counts, coverage = masks.sum((1, 2)), masks.mean(0)
    full = 1.0 if exact else 0.666
    assert abs((counts == NUM_MASKED).mean() - full) < 0.025
    assert abs(counts.mean() - (75 if exact else 74.475)) < 0.06
    assert abs(coverage[6:8, 6:8].mean() - 0.716) < 0.025
    assert abs(coverage[[0, 0, -1, -1], [0, -1, 0, -1]].mean() - 0.041) < 0.01


@pytest.mark.benchmark(group="mask sampler")
@pytest.mark.parametrize("name", SAMPLERS)
def test_mask_sampler(benchmark: Any, name: str) -> None:
    draw = SAMPLERS[name]()
    check_statistics(draw, exact=name.endswith("exact"))
    benchmark.extra_info |= {"batch": BATCH, "grid": GRID, "num_masked": NUM_MASKED, "threads": 1}
    if name != "python port":
        speedup = measure_speedup(draw, python_port(), repeats=40, clock=time.process_time)._asdict()
        benchmark.extra_info["speedup_over_python_port"] = speedup
    benchmark(draw)
    benchmark.extra_info["us_per_sample_median"] = benchmark.stats["median"] / BATCH * 1e6
