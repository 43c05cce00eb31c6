"""`color_jitter`: schema and dispatch. It has no gradient: its input is bytes.

On the CPU it is the plain formula: the data pipeline has `beit_fast._C.transform_views` there, one pass with threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from beit_fast.kernels.backend import chosen_backend, triton_runs
from beit_fast.kernels.color_jitter import reference
from beit_fast.kernels.registration import plain_op


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
    """
    if crops.dim() != 4 or crops.shape[3] != 3 or crops.dtype != torch.uint8:
        raise ValueError(f"crops must be uint8 (B, H, W, 3), got {crops.dtype} {tuple(crops.shape)}")
    B = crops.shape[0]
    for name, tensor, shape in (("flips", flips, (B,)), ("factors", factors, (B, 3)), ("centers", centers, (B,))):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std must have three values each, got {len(mean)} and {len(std)}")
    if chosen_backend() == "reference":
        return reference.color_jitter(crops, flips, factors, centers, mean, std, dtype)
    return _color_jitter(crops, flips, factors, centers, list(mean), list(std), dtype)


def _impl(
    crops: Tensor,
    flips: Tensor,
    factors: Tensor,
    centers: Tensor,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    if triton_runs(crops):
        from beit_fast.kernels.color_jitter import kernel

        return kernel.color_jitter(crops, flips, factors, centers, mean, std, dtype)
    return reference.color_jitter(crops, flips, factors, centers, mean, std, dtype).contiguous()


def _fake(
    crops: Tensor,
    flips: Tensor,
    factors: Tensor,
    centers: Tensor,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    B, H, W, _ = crops.shape
    return crops.new_empty((B, 3, H, W), dtype=dtype)


_color_jitter = plain_op("color_jitter", _impl, _fake)
