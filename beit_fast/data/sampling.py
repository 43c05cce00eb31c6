"""What is random about a sample: its mask, its view, its place in the epoch, its drop-path key.

All of it is a function of (seed, epoch, sample index) computed in `beit_fast._C`: the same data at any batch size,
world size or thread count, and nothing to store in a checkpoint but (epoch, step).
"""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
"""Step of the counters that `splitmix64` mixes."""
Integers = TypeVar("Integers", NDArray[np.int64], torch.Tensor)


def splitmix64(x: Integers) -> Integers:
    """Mix the bits of int64 numbers, an array or a tensor: the finaliser of splitmix64 (Steele et al., 2014)."""
    x = (x ^ shift_right(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ shift_right(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ shift_right(x, 31)


def shift_right(x: Integers, bits: int) -> Integers:
    """Shift int64 numbers and fill with zeros; `>>` fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(keys: ArrayLike, count: int, stream: int) -> NDArray[np.float64]:
    """Draw `count` numbers in [0, 1) for each of the `keys` int64 (B,) of `sample_keys`; (B, count).

    Row b depends on `keys[b]` and `stream` alone; streams (small numbers, one per use) are independent.
    """
    own = splitmix64(np.asarray(keys, np.int64) ^ splitmix64(np.array([stream + 1], np.int64)))
    counters = np.arange(1, count + 1, dtype=np.int64) * GOLDEN
    return shift_right(splitmix64(own[:, None] + counters), 11).astype(np.float64) * 2.0**-53


def compiled_module() -> ModuleType:
    """Return `beit_fast._C`.

    Raises:
        ModuleNotFoundError: it was not built; with the way out.
    """
    try:
        from beit_fast import _C
    except ImportError as error:
        raise ModuleNotFoundError(
            f"beit_fast._C, which samples masks and views, cannot be imported ({error}); "
            "build it with a C++20 compiler at hand: pip install . (BEIT_FAST_BUILD unset or 1)"
        ) from error
    return _C


@dataclass(frozen=True)
class BlockwiseMasking:
    """BEiT's blockwise masking (paper, algorithm 1; section 2.3), as the official code runs it.

    Modes: `exact` always masks `num_masked` patches: where the official algorithm stops short (a third of the samples,
    by a patch or two), the mask grows by neighbouring patches. `official` stops short. `random` takes patches without
    regard to blocks (the ablation of the paper's table 4), `none` masks nothing.

    Raises:
        ValueError: an argument is out of its range; it is named.
        ModuleNotFoundError: `beit_fast._C` was not built.

    Examples:
        >>> from beit_fast.data import BlockwiseMasking
        >>> masks = BlockwiseMasking((14, 14), 75).sample(seed=0, epoch=0, indices=[0, 1])
        >>> masks.shape, masks.dtype, masks.sum((1, 2)).tolist()
        (torch.Size([2, 14, 14]), torch.bool, [75, 75])
    """

    grid: tuple[int, int]
    """Patches per column and per row (h, w), each from 1 to 64."""
    num_masked: int
    """Patches to mask; 75 of 14 x 14 in the paper."""
    mode: str = "exact"
    min_num_patches: int = 16
    """Least area of a block, in patches."""
    max_num_patches: int | None = None
    """Largest area of a block; `num_masked` where None."""
    min_aspect: float = 0.3
    """Least ratio of rows to columns of a block; the largest is its inverse."""

    def __post_init__(self) -> None:
        if len(self.grid) != 2 or not all(1 <= side <= 64 for side in self.grid):
            raise ValueError(f"grid must be two numbers of patches (rows, columns) from 1 to 64, got {self.grid}")
        self.sample(0, 0, [])  # what else is wrong is said now, not in the first batch

    def sample(self, seed: int, epoch: int, indices: ArrayLike) -> torch.Tensor:
        """Return the masks of the samples `indices` (B,) as bool (B, h, w), True where masked."""
        samples = np.asarray(indices, dtype=None if np.size(indices) else np.int64)
        masks = torch.empty((samples.size, *self.grid), dtype=torch.bool)
        compiled_module().sample_masks(
            masks.numpy(),
            samples,
            seed,
            epoch,
            self.num_masked,
            min_num_patches=self.min_num_patches,
            max_num_patches=self.max_num_patches,
            min_aspect=self.min_aspect,
            mode=self.mode,
        )
        return masks


class Views(NamedTuple):
    """How each sample is to be cropped and coloured."""

    windows: NDArray[np.int32]
    """(B, 4): top, left, height, width, in pixels of the source image."""
    flips: NDArray[np.bool_]
    """(B,)"""
    factors: NDArray[np.float32]
    """(B, 3): brightness, contrast, saturation."""


@dataclass(frozen=True)
class CropSampler:
    """Random resized crop, horizontal flip and colour jitter of pre-training (paper, appendix; no hue).

    Raises:
        ValueError: an argument is out of its range; it is named.
        ModuleNotFoundError: `beit_fast._C` was not built.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the window over that of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the window, uniform in its logarithm."""
    flip_probability: float = 0.5
    brightness: float = 0.4
    """The factor is uniform in [max(0, 1 - brightness), 1 + brightness]; likewise below."""
    contrast: float = 0.4
    saturation: float = 0.4

    def __post_init__(self) -> None:
        self.sample(0, 0, [], [], [])

    def sample(self, seed: int, epoch: int, indices: ArrayLike, heights: ArrayLike, widths: ArrayLike) -> Views:
        """Return the views of the samples `indices` (B,), whose images measure `heights` x `widths` (B,) pixels."""
        return Views(
            *compiled_module().sample_views(
                heights,
                widths,
                indices,
                seed,
                epoch,
                scale=self.scale,
                ratio=self.ratio,
                flip_probability=self.flip_probability,
                brightness=self.brightness,
                contrast=self.contrast,
                saturation=self.saturation,
            )
        )


def epoch_order(positions: ArrayLike, length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return which samples of [0, length) stand at `positions` (P,) of the epoch: each exactly once per epoch.

    The permutation is computed entry by entry, never stored.
    """
    return compiled_module().permute(positions, length, seed, epoch)


def sample_keys(seed: int, epoch: int, indices: ArrayLike) -> torch.Tensor:
    """Return 64 random bits per sample as int64 (B,), from which drop path takes its decisions."""
    return torch.from_numpy(compiled_module().sample_keys(indices, seed, epoch))
