"""Colour jitter, flip and normalisation of resized views with torch operations: the way on a GPU.

The CPU has the same in one pass, `beit_fast._C.transform_views`, which tests compare with this text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GRAY = (0.299, 0.587, 0.114)  # ITU-R 601


def gray_means(crops: Tensor) -> Tensor:
    """Mean gray level (B,) float32 in [0, 255] of uint8 images (B, H, W, 3)."""
    means = crops.sum(dim=(1, 2), dtype=torch.int64).double() / (crops.shape[1] * crops.shape[2])
    return (means @ means.new_tensor(GRAY)).float()


def transform_views(
    crops: Tensor, flips: Tensor, factors: Tensor, centers: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Brightness, contrast, saturation (in this order, clipped to [0, 255] after each), flip, normalisation.

    crops uint8 (B, H, W, 3); flips bool (B,); factors float32 (B, 3); centers float32 (B,): the gray level that
    contrast leaves as it is, before brightness. Returns (x / 255 - mean) / std as float32 (B, 3, H, W).
    """
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in factors.unbind(1))
    x = (crops.permute(0, 3, 1, 2) * brightness).clamp_(0, 255)
    center = (centers[:, None, None, None] * brightness).clamp_(0, 255)
    x = torch.lerp(center, x, contrast).clamp_(0, 255)
    gray = torch.einsum("bchw,c->bhw", x, x.new_tensor(GRAY))[:, None]
    x = torch.lerp(gray, x, saturation).clamp_(0, 255)
    x = torch.where(flips[:, None, None, None], x.flip(3), x)
    scale, shift = x.new_tensor(mean)[:, None, None], x.new_tensor(std)[:, None, None]
    return (x / 255 - scale) / shift
