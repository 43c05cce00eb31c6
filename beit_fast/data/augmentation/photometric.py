"""Photometric distortion of segmentation's training crops (mmsegmentation's, after Liu et al., "SSD", ECCV 2016).

Brightness, contrast, saturation and hue, each in half of the crops; contrast comes first or last. All of it in float
and for a whole batch on its device; mmsegmentation rounds to bytes, and hues to 2 degrees, in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from beit_fast.data.sampling import uniforms

_STREAM = 4


@dataclass(frozen=True)
class PhotometricDistortion:
    """Strength of the distortion; the defaults are mmsegmentation's.

    Raises:
        ValueError: a strength is negative, or `contrast` or `saturation` above 1.
    """

    brightness: float = 32.0
    """Largest change of all levels, of 255."""
    contrast: float = 0.5
    """The factor on all levels is in [1 - contrast, 1 + contrast]."""
    saturation: float = 0.5
    """The factor on HSV's saturation is in [1 - saturation, 1 + saturation]."""
    hue: int = 18
    """Largest change of HSV's hue in steps of 2 degrees; the largest step up is left out, as there."""

    def __post_init__(self) -> None:
        if self.brightness < 0 or self.hue < 0 or not (0 <= self.contrast <= 1 and 0 <= self.saturation <= 1):
            raise ValueError(
                "photometric distortion: needs brightness and hue >= 0, contrast and saturation in [0, 1], got "
                f"{self.brightness}, {self.hue}, {self.contrast}, {self.saturation}"
            )

    def sample(self, keys: ArrayLike) -> NDArray[np.float32]:
        """(B, 5) for the crops with the `keys` int64 (B,).

        Levels added, contrast factor applied first, saturation factor, degrees of hue, contrast factor applied last.
        """
        u = uniforms(keys, 9, _STREAM)
        on, strength = u[:, 0:8:2] < 0.5, 2 * u[:, 1:8:2] - 1
        added = np.where(on[:, 0], self.brightness * strength[:, 0], 0.0)
        contrast = np.where(on[:, 1], 1 + self.contrast * strength[:, 1], 1.0)
        saturation = np.where(on[:, 2], 1 + self.saturation * strength[:, 2], 1.0)
        degrees = np.where(on[:, 3], 2 * np.floor(self.hue * strength[:, 3]), 0.0)
        first = u[:, 8] < 0.5
        before, after = np.where(first, contrast, 1.0), np.where(first, 1.0, contrast)
        return np.stack([added, before, saturation, degrees, after], 1).astype(np.float32)


def distort(levels: Tensor, plan: NDArray[np.float32]) -> Tensor:
    """Levels float (B, 3, H, W) in [0, 255], distorted as `plan` (B, 5) says, clipped after each step."""
    added, before, saturation, degrees, after = (
        torch.from_numpy(column)[:, None, None, None].to(levels.device, non_blocking=True)
        for column in np.ascontiguousarray(plan.T)
    )
    x = (levels + added).clamp_(0, 255).mul_(before).clamp_(0, 255)
    coloured = np.flatnonzero((plan[:, 2] != 1) | (plan[:, 3] != 0))
    if len(coloured):
        rows = torch.from_numpy(coloured).to(levels.device, non_blocking=True)
        x[rows] = shift_colours(x[rows], saturation[rows], degrees[rows])
    return x.mul_(after).clamp_(0, 255)


def shift_colours(levels: Tensor, saturation: Tensor, degrees: Tensor) -> Tensor:
    """Saturation times a factor and hue plus `degrees`, both in HSV; levels (B, 3, H, W), the others (B, 1, 1, 1)."""
    red, green, blue = levels.unbind(1)
    value, which = levels.max(1)
    chroma = value - levels.amin(1)
    safe = torch.where(chroma > 0, chroma, 1)
    sectors = torch.where(which == 0, green - blue, torch.where(which == 1, blue - red, red - green)) / safe
    sectors = (sectors + 2.0 * which + degrees[:, 0] / 60.0)[:, None]
    chroma = torch.minimum(chroma[:, None] * saturation, value[:, None])
    offsets = torch.tensor([5.0, 3.0, 1.0], device=levels.device)[:, None, None]
    turned = (sectors + offsets).remainder(6.0)
    return value[:, None] - chroma * torch.minimum(turned, 4.0 - turned).clamp(0, 1)
