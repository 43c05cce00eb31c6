"""The compiled module (csrc/): samplers keyed by (seed, epoch, sample) through Philox, the CPU view transform, and CPU
kernels for `beit_fast.kernels`.

Every draw is a function of (seed, epoch, sample): the same for any batch split, rank, thread count and machine.
`seed` is in [0, 2**64), `epoch` in [0, 2**32), sample indices are non-negative. Integer arguments take any array or
list of integers; pixels, factors and outputs are numpy arrays, C-contiguous and of exactly the dtype named (a CPU
tensor passes as `tensor.numpy()`). A bad argument raises `ValueError` naming it. The GIL is released during the work.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

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

# The kernels behind `beit_fast.kernels` take contiguous float32 tensors on a CPU, or None where a call has none, and a
# number of OpenMP threads, which changes no result. ValueError names a tensor of another kind or size.

HAS_VECTORS: bool
"""Whether the kernels below are compiled for AVX2 and FMA, too, or the machine is no x86-64: else torch is faster."""
HAS_THREADS: bool
"""Whether the module was compiled with OpenMP; without it the kernels below run on one thread."""
ROWS_PER_SUM: int
"""Rows of one piece of the sums that the gradients give: pieces = ceil(rows / ROWS_PER_SUM)."""

def bias_gelu(x: Tensor, bias: Tensor | None, value: Tensor, derivative: Tensor, threads: int) -> None:
    """Writes the exact GELU of x (..., D) + bias (D,) into `value`, and its derivative there into `derivative`.

    Either may be x itself.
    """

def bias_gelu_backward(grad: Tensor, derivative: Tensor, grad_x: Tensor, sums: Tensor, threads: int) -> None:
    """Writes grad * derivative (..., D) into `grad_x`, and its sums over the rows into `sums` (pieces, D)."""

def residual_norm(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    branch_bias: Tensor | None,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    total: Tensor,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    threads: int,
) -> None:
    """Writes the results of `residual_layer_norm` and each row's mean and 1/std (B, N).

    Without `weight` it is `residual_add`, and the last three are empty. `kept` is int64.
    """

def residual_norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    kept: Tensor | None,
    grad_x: Tensor,
    grad_branch: Tensor | None,
    sums: Tensor,
    threads: int,
) -> None:
    """Writes the gradients of x and branch, and `sums` (4, pieces, D) over the rows of four products.

    They are grad_normed times the normalised total, grad_normed, drop_path * grad_x * branch and drop_path * grad_x.
    Without `grad_normed` there is no LayerNorm: `grad_total` takes the place of `grad_x`, which is then empty. Without
    `branch` the third sums are 0.
    """

def biased_softmax(scores: Tensor, bias: Tensor | None, threads: int) -> None:
    """softmax(scores + bias) over the last dimension, in place: (B, H, N, N), bias (H, N, N)."""

def softmax_backward(
    grad: Tensor,
    weights: Tensor,
    bias_sum: Tensor | None,
    group_sum: Tensor | None,
    first: int,
    batch: int,
    group: int,
    threads: int,
) -> None:
    """The gradient of the scores in place of that of the weights, (B, H, N, N), and added up into `bias_sum`.

    The samples, of which `first` of `batch` is the first here, are summed in groups: in `group_sum` (H, N, N) up to
    each multiple of `group` and the last. Sample 0 starts both sums.
    """
