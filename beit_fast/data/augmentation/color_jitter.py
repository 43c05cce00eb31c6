"""The gray level that the contrast of a colour jitter leaves as it is, on the device of the crops."""

from __future__ import annotations

import torch
from torch import Tensor


def gray_means(crops: Tensor) -> Tensor:
    """Mean gray level (B,) float32 in [0, 255] of uint8 images (B, H, W, 3), by the weights of ITU-R 601."""
    sums = crops.sum(dim=(1, 2), dtype=torch.int64).double()  # (B, 3)
    red, green, blue = (sums / (crops.shape[1] * crops.shape[2])).unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).float()
