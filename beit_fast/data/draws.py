"""Uniform numbers from a sample's key: what is random about a labelled view, whatever batch it is in."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(keys: ArrayLike, count: int, stream: int) -> NDArray[np.float64]:
    """(B, count) numbers in [0, 1), `count` for each of the `keys` int64 (B,) of `sampling.sample_keys`.

    Row b depends on `keys[b]` and `stream` alone; streams (small numbers, one per use) are independent.
    """
    own = _splitmix64(np.asarray(keys, np.int64).view(np.uint64) ^ _splitmix64(np.array([stream + 1], np.uint64)))
    counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (_splitmix64(own[:, None] + counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
