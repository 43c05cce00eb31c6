"""Random erasing (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020) with noise per pixel, on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from beit_fast.data.sampling import GOLDEN, shift_right, splitmix64, uniforms

_ATTEMPTS = 10


@dataclass(frozen=True)
class RandomErasing:
    """Which rectangle of a view is replaced by noise; the defaults are those of BEiT's fine-tuning (paper, table 13).

    Raises:
        ValueError: a share outside [0, 1], or the smallest above the largest.
    """

    probability: float = 0.25
    """Share of the views that lose a rectangle."""
    min_area: float = 0.02
    """Smallest rectangle, as a share of the view."""
    max_area: float = 1 / 3
    """Largest rectangle."""
    min_aspect: float = 0.3
    """Smallest height over width; the largest is its inverse. Uniform in the logarithm."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"erasing: probability must be in [0, 1], got {self.probability}")
        if not 0 < self.min_area <= self.max_area <= 1 or not 0 < self.min_aspect <= 1:
            raise ValueError(
                f"erasing: needs 0 < min_area <= max_area <= 1 and 0 < min_aspect <= 1, got {self.min_area}, "
                f"{self.max_area}, {self.min_aspect}"
            )

    def sample(self, keys: ArrayLike, size: tuple[int, int]) -> NDArray[np.int64]:
        """Rectangles (B, 4) as top, left, height, width in views of `size` (H, W); height 0 where nothing is erased.

        Ten rectangles are drawn per view and the first that is smaller than the view in both directions is taken.
        """
        height, width = size
        u = uniforms(keys, 1 + 4 * _ATTEMPTS, stream=1)
        tries = u[:, 1:].reshape(-1, _ATTEMPTS, 4)
        area = (self.min_area + (self.max_area - self.min_area) * tries[..., 0]) * (height * width)
        aspect = np.exp((2 * tries[..., 1] - 1) * -math.log(self.min_aspect))
        h = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        w = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (h < height) & (w < width)
        rows, first = np.arange(len(u)), fits.argmax(1)
        h, w, corner = h[rows, first], w[rows, first], tries[rows, first, 2:]
        top = (corner[:, 0] * (height - h + 1)).astype(np.int64)
        left = (corner[:, 1] * (width - w + 1)).astype(np.int64)
        erased = fits.any(1) & (u[:, 0] < self.probability) & (h > 0) & (w > 0)
        return np.where(erased[:, None], np.stack([top, left, h, w], 1), 0)


def erase(images: Tensor, rectangles: NDArray[np.int64], keys: Tensor) -> Tensor:
    """Fill `rectangles` (B, 4) of normalised images float (B, C, H, W) with N(0, 1) noise, in place; returns them.

    The noise of a pixel depends on `keys` int64 (B,) and its position alone: it is the same in any batch and on any
    device up to rounding. All pixels of the batch are drawn at once, without waiting for the device.
    """
    chosen = np.flatnonzero(rectangles[:, 2] > 0)
    if not len(chosen):
        return images
    _, channels, height, width = images.shape
    areas = rectangles[chosen, 2] * rectangles[chosen, 3]
    total = int(areas.sum())
    starts = np.cumsum(areas) - areas
    table = np.column_stack([chosen, starts, rectangles[chosen][:, [0, 1, 3]]])
    per_image = torch.from_numpy(table).to(images.device, non_blocking=True)
    counts = torch.from_numpy(areas).to(images.device, non_blocking=True)
    sample, start, top, left, across = per_image.repeat_interleave(counts, dim=0, output_size=total).unbind(1)
    within = torch.arange(total, device=images.device) - start
    y, x = top + within // across, left + within % across
    channel = torch.arange(channels, device=images.device)
    counter = (channel * height + y[:, None]) * width + x[:, None] + 1
    noise = _normal(keys[sample][:, None] + counter * GOLDEN)
    images[sample[:, None], channel, y[:, None], x[:, None]] = noise.to(images.dtype)
    return images


def _normal(x: Tensor) -> Tensor:
    """Standard normal float32 from 64-bit counters (Box and Muller's transform)."""
    x = splitmix64(x)
    radius = torch.sqrt(-2.0 * torch.log((shift_right(x, 40) + 1).to(torch.float32) * 2.0**-24))
    return radius * torch.cos((x & 0xFFFFFF).to(torch.float32) * (2.0 * math.pi * 2.0**-24))
