"""Colour jitter of float images, and the gray level that its contrast leaves as it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.data.sampling import compiled_module

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


def gray_means(crops: Tensor) -> Tensor:
    """Mean gray level (B,) float32 of images, on their device.

    Of uint8 (B, H, W, 3) by the weights of ITU-R 601, in [0, 255]; of float32 (B, H, W, C), in [0, 1], so for three
    channels and by the plain mean of the channels for others.
    """
    pixels = crops.shape[1] * crops.shape[2]
    if crops.dtype == torch.uint8:
        means = crops.sum(dim=(1, 2), dtype=torch.int64).double() / pixels  # (B, 3)
    else:
        means = crops.double().sum(dim=(1, 2)) / pixels
    if crops.shape[3] != 3:
        return means.mean(1).float()
    return sum(weight * channel for weight, channel in zip(_LUMA, means.unbind(1), strict=True)).float()  # type: ignore[union-attr]


def mean_gray(images: NDArray[np.generic]) -> NDArray[np.float32]:
    """`gray_means` of arrays in memory (B, H, W, C)."""
    if images.dtype == np.uint8:
        means: NDArray[np.float32] = compiled_module().gray_means(images)
        return means
    return gray_means(torch.from_numpy(images)).numpy()


def jitter_floats(
    views: Tensor, flips: Tensor, factors: Tensor, centers: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Jitter, flip and normalise float32 (B, H, W, C) in [0, 1]: float32 (B, C, H, W), as the byte kernels do.

    Brightness and contrast have a meaning for any pixels; saturation for three channels only, and is left out of
    others. `centers` (B,): the gray level that contrast leaves alone.
    """
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in factors.unbind(1))
    x = views.permute(0, 3, 1, 2)
    x = (x * brightness).clamp(0, 1)
    x = (x * contrast + (1 - contrast) * brightness * centers[:, None, None, None]).clamp_(0, 1)
    if x.shape[1] == 3:
        gray = (x * torch.tensor(_LUMA, device=x.device)[:, None, None]).sum(1, keepdim=True)
        x = (x * saturation + (1 - saturation) * gray).clamp_(0, 1)
    x = torch.where(flips[:, None, None, None], x.flip(3), x)
    scale, shift = (torch.tensor(values, device=x.device)[:, None, None] for values in (std, mean))
    return ((x - shift) / scale).contiguous()
