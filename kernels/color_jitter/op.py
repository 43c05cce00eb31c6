"""The operation `color_jitter`. It has no gradient: its input is bytes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from beit_fast.kernels.backend import select
from beit_fast.kernels.color_jitter import cpu, reference
from beit_fast.kernels.registration import fused_op


def color_jitter(
    crops: Tensor,
    flips: Tensor,
    factors: Tensor,
    centers: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Brightness, contrast, saturation (in this order, clipped to [0, 255] after each), flip, normalisation.

    What `beit_fast._C.transform_views` does on the CPU, for tensors of any device. The input of a tokenizer that maps
    pixels to a x + b is the normalisation mean = -b / a, std = 1 / a.

    Args:
        crops: uint8 (B, H, W, 3), resized views.
        flips: bool (B,), whether to mirror left and right.
        factors: float32 (B, 3): brightness, contrast, saturation.
        centers: float32 (B,): the gray level, before brightness, that contrast leaves as it is.
        mean, std: of the three channels, for pixels in [0, 1].
        dtype: of the result.

    Returns:
        (B, 3, H, W): (x / 255 - mean) / std.

    Raises:
        ValueError: a shape or the dtype of `crops` does not fit.
    """
    if crops.dim() != 4 or crops.shape[3] != 3 or crops.dtype != torch.uint8:
        raise ValueError(f"crops must be uint8 (B, H, W, 3), got {crops.dtype} {tuple(crops.shape)}")
    B = crops.shape[0]
    for name, tensor, shape in (("flips", flips, (B,)), ("factors", factors, (B, 3)), ("centers", centers, (B,))):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std must have three values each, got {len(mean)} and {len(std)}")
    backend = select("color_jitter", crops)
    if backend == "reference":
        return reference.color_jitter(crops, flips, factors, centers, mean, std, dtype)
    return _color_jitter(crops, flips, factors, centers, list(mean), list(std), dtype, backend)


def _fake(crops: Tensor, flips: Tensor, factors: Tensor, centers: Tensor, *others: Any) -> Tensor:
    B, H, W, _ = crops.shape
    return crops.new_empty((B, 3, H, W), dtype=others[2])


@fused_op("beit_fast::color_jitter", fake=_fake)
def _color_jitter(
    crops: Tensor,
    flips: Tensor,
    factors: Tensor,
    centers: Tensor,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    if backend == "triton":
        from beit_fast.kernels.color_jitter import kernel

        return kernel.color_jitter(crops, flips, factors, centers, mean, std, dtype)
    return cpu.color_jitter(crops, flips, factors, centers, mean, std, dtype)
