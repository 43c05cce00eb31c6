"""The definition of `color_jitter`."""

from collections.abc import Sequence

import torch
from torch import Tensor


def color_jitter(
    crops: Tensor,
    flips: Tensor,
    factors: Tensor,
    centers: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Brightness, contrast, saturation, each clipped to [0, 255]; flip; (x / 255 - mean) / std as (B, 3, H, W)."""
    wide = factors.dtype if factors.dtype == torch.float64 else torch.float32
    brightness, contrast, saturation = (factor[:, None, None, None] for factor in factors.to(wide).unbind(1))
    x = (brightness * crops.permute(0, 3, 1, 2)).clamp(0, 255)
    level = (brightness * centers.to(wide)[:, None, None, None]).clamp(0, 255)
    x = (contrast * x + (1 - contrast) * level).clamp(0, 255)
    red, green, blue = x.unbind(1)
    gray = (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]
    x = (saturation * x + (1 - saturation) * gray).clamp(0, 255)
    x = torch.where(flips[:, None, None, None], x.flip(3), x)
    # one channel at a time with Python's numbers: a tensor made of them would have a GPU wait for the host
    channels = [(c / 255 - m) / s for c, m, s in zip(x.unbind(1), mean, std, strict=True)]
    return torch.stack(channels, 1).to(dtype)
