"""Blockwise masks for a batch of 128 on a 14 x 14 grid, 75 masked: beit_fast beside the algorithm in plain Python.

    pytest benchmarks/bench_mask_sampler.py --benchmark-only

One thread each. All must draw from the same distribution before anything is timed: coverage and counts are compared.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beit_fast.data.sampling import BlockwiseMasking
from benchmarks.baselines.libraries import PythonBlockwiseMasking
from benchmarks.harness import OURS, Comparison, Disagreement, Implementation

BATCH = 128
GRID = (14, 14)
NUM_MASKED = 75

NAMES = [OURS, "beit_fast, mode official", "plain Python"]


def ours(mode: str, batch: int) -> Implementation:
    masking = BlockwiseMasking(GRID, NUM_MASKED, mode=mode)
    batches = itertools.count()

    def draw() -> Tensor:
        first = batch * next(batches)
        return masking.sample(0, 0, np.arange(first, first + batch))

    return as_implementation(draw, batch)


def plain_python(batch: int) -> Implementation:
    masking = PythonBlockwiseMasking(GRID, NUM_MASKED)
    return as_implementation(lambda: torch.from_numpy(np.stack([masking() for _ in range(batch)]).astype(bool)), batch)


def as_implementation(draw: Callable[[], Tensor], batch: int) -> Implementation:
    return Implementation(draw, lambda: {"masks": torch.cat([draw() for _ in range(12_800 // batch)])})


def distances(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, float]:
    """How far two samples of 12800 masks are apart; chance alone gives 0.02 in some cell and 0.03 in the mean count.

    Mode `exact` is ours: it masks half a patch more than the official algorithm, which stops short in a third of them.
    """
    a, b = expected["masks"].double(), found["masks"].double()
    errors = {
        "coverage": float((a.mean(0) - b.mean(0)).abs().max()),
        "mean_count": float((a.sum((1, 2)).mean() - b.sum((1, 2)).mean()).abs()),
    }
    if errors["coverage"] > 0.03 or errors["mean_count"] > 0.6:
        raise Disagreement(f"not BEiT's masks: {errors}")
    return errors


def comparison(batch: int) -> Comparison:
    return Comparison(
        group=f"mask sampler: {batch} masks of {NUM_MASKED} in {GRID[0]} x {GRID[1]}",
        implementations={
            OURS: lambda: ours("exact", batch),
            "beit_fast, mode official": lambda: ours("official", batch),
            "plain Python": lambda: plain_python(batch),
        },
        shapes={"B": batch, "grid": GRID, "M": NUM_MASKED},
        dtype="bool",
        images=batch,
        compared_by=distances,
    )


@pytest.mark.parametrize("name", NAMES)
def test_mask_sampler(interleaved: Any, scale: Any, name: str) -> None:
    batch = scale.pick(tiny=8, cpu=BATCH, gpu=BATCH)
    interleaved("mask sampler", lambda: comparison(batch), name)
