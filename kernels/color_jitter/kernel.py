# mypy: allow-untyped-defs
"""Triton kernel of `color_jitter`: every byte is read once, every output written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.launch_table import launch, launch_config
from beit_fast.kernels.tiles import narrow


@triton.jit
def clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def color_jitter_kernel(
    crops_ptr, flips_ptr, factors_ptr, centers_ptr, out_ptr, H, W,
    scale_red, scale_green, scale_blue, shift_red, shift_green, shift_blue, BLOCK: tl.constexpr,
):  # fmt: skip
    # Program (j, b): the pixels j of image b. The two images it works on are far apart only by whole pictures: int64.
    image = tl.program_id(1).to(tl.int64)
    pixels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], as all below
    inside = pixels < H * W
    brightness = tl.load(factors_ptr + 3 * image)
    contrast = tl.load(factors_ptr + 3 * image + 1)
    saturation = tl.load(factors_ptr + 3 * image + 2)
    offset = (1.0 - contrast) * clip(brightness * tl.load(centers_ptr + image))
    x = pixels % W
    mirrored = pixels - x + (W - 1 - x)
    source = tl.where(tl.load(flips_ptr + image) != 0, mirrored, pixels)
    crop_ptr = crops_ptr + image * H * W * 3 + source * 3
    red = clip(brightness * tl.load(crop_ptr, mask=inside, other=0).to(tl.float32))
    green = clip(brightness * tl.load(crop_ptr + 1, mask=inside, other=0).to(tl.float32))
    blue = clip(brightness * tl.load(crop_ptr + 2, mask=inside, other=0).to(tl.float32))
    red = clip(contrast * red + offset)
    green = clip(contrast * green + offset)
    blue = clip(contrast * blue + offset)
    gray = (1.0 - saturation) * (0.299 * red + 0.587 * green + 0.114 * blue)
    red = clip(saturation * red + gray) * scale_red + shift_red
    green = clip(saturation * green + gray) * scale_green + shift_green
    blue = clip(saturation * blue + gray) * scale_blue + shift_blue
    here = out_ptr + image * H * W * 3 + pixels
    tl.store(here, narrow(red, out_ptr.dtype.element_ty), mask=inside)
    tl.store(here + H * W, narrow(green, out_ptr.dtype.element_ty), mask=inside)
    tl.store(here + 2 * H * W, narrow(blue, out_ptr.dtype.element_ty), mask=inside)


def color_jitter(
    crops: Tensor,
    flips: Tensor,
    factors: Tensor,
    centers: Tensor,
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """crops uint8 (B, H, W, 3) -> (B, 3, H, W) of `dtype`."""
    B, H, W, _ = crops.shape
    out = crops.new_empty((B, 3, H, W), dtype=dtype)
    if out.numel() == 0:
        return out
    config = launch_config("color_jitter", crops.device)
    scales = [1 / (255 * s) for s in std]
    shifts = [-m / s for m, s in zip(mean, std, strict=True)]
    launch(
        color_jitter_kernel, (triton.cdiv(H * W, config["BLOCK"]), B),
        crops.contiguous(), flips.contiguous().view(torch.uint8), factors.contiguous().float(),
        centers.contiguous().float(), out, H, W, *scales, *shifts, **config,
    )  # fmt: skip
    return out
