"""The compiled module (csrc/): samplers keyed by (seed, epoch, sample) through Philox, and the CPU view transform.

Every draw is a function of (seed, epoch, sample): the same for any batch split, rank, thread count and machine.
`seed` is in [0, 2**64), `epoch` in [0, 2**32), sample indices are non-negative. Integer arguments take any array or
list of integers; pixels, factors and outputs are numpy arrays, C-contiguous and of exactly the dtype named (a CPU
tensor passes as `tensor.numpy()`). A bad argument raises `ValueError` naming it. The GIL is released during the work.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

def sample_masks(
    out: NDArray[np.uint8] | NDArray[np.bool_],
    indices: ArrayLike,
    seed: int,
    epoch: int,
    num_masked: int,
    min_num_patches: int = 16,
    max_num_patches: int | None = None,
    min_aspect: float = 0.3,
    max_aspect: float | None = None,
    mode: str = "exact",
) -> NDArray[np.int32]:
    """Writes blockwise masks (paper, algorithm 1) into `out` (B, h, w), 1 where masked; returns the counts (B,).

    `max_num_patches` is `num_masked` unless given, `max_aspect` 1 / `min_aspect`; aspect is rows over columns.
    Modes: "exact" places blocks as the official code does and, where it stopped short, grows the mask by neighbouring
    cells to exactly `num_masked`; "official" stops short (at most `num_masked`; even 0 where no block fits the grid);
    "random" takes `num_masked` cells without replacement; "none" masks nothing. Grids up to 64 x 64.
    """

def sample_views(
    heights: ArrayLike,
    widths: ArrayLike,
    indices: ArrayLike,
    seed: int,
    epoch: int,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip_probability: float = 0.5,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float32]]:
    """Crop windows as RandomResizedCrop draws them, flips and colour factors.

    Returns windows (B, 4) as top, left, height, width in pixels (always inside the image, at least 1 x 1), flips (B,)
    and factors (B, 3) for brightness, contrast and saturation, each uniform in [max(0, 1 - x), 1 + x]. `scale` is area
    of the window over area of the image, `ratio` width over height, drawn uniformly in the logarithm.
    """

def permute(positions: ArrayLike, length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Sends positions (P,) in [0, length) through the epoch's permutation of [0, length), without storing it."""

def sample_keys(indices: ArrayLike, seed: int, epoch: int) -> NDArray[np.int64]:
    """64 random bits per sample (B,)."""

def transform_views(
    crops: NDArray[np.uint8],
    flips: NDArray[np.bool_] | NDArray[np.uint8],
    factors: NDArray[np.float32],
    centers: NDArray[np.float32] | None,
    mean: Sequence[float] | NDArray[Any],
    std: Sequence[float] | NDArray[Any],
    out: NDArray[np.float32] | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """Colour jitter, flip and normalisation of crops (B, h, w, 3) into `out` (B, 3, h, w), in one pass.

    With b, c, s = factors (B, 3), m = centers (B,) the gray means of the is_stock images (of each view when None) and
    gray(x) = 0.299 R + 0.587 G + 0.114 B, values in [0, 255] and clipped to it after each step:
    x <- b x;  x <- c x + (1 - c) clip(b m);  x <- s x + (1 - s) gray(x);  flip;  (x / 255 - mean) / std.
    """

def gray_means(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Gray means (B,) in [0, 255] of crops (B, h, w, 3), with the weights of ITU-R 601."""

def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """One block of the generator: four 32-bit words from a counter of four and a key of two."""
