"""The same on plain torch ops, on whatever device: products of half-precision values summed in fp32, rounded once."""

import torch
import torch.nn.functional as F
from torch import Tensor

SUM_ERROR = 2.0**-22
"""Of each addition inside a product, as a share of the sum of magnitudes: four roundings of fp32, since tensor cores
align and cut what they add."""


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """x (..., C), bias (C,) in at least fp32."""
    return (x + bias).relu_().to(x.dtype)


def pool_bias_relu(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, H, W, C) -> (B, H/2, W/2, C), twice."""
    y = F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1) + bias
    return y.to(x.dtype), y.relu().to(x.dtype)


def pixel_conv(images: Tensor, weight: Tensor, bias: Tensor, scale: float, shift: float) -> tuple[Tensor, Tensor]:
    """images (B, 3, H, W) -> (B, H, W, N), twice."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    pixels = (scale * images + shift).to(weight.dtype).to(wide)
    y = F.conv2d(pixels, weight.to(wide), bias.to(wide), padding=weight.shape[-1] // 2)
    y = y.permute(0, 2, 3, 1).contiguous()
    return y.to(weight.dtype), y.relu().to(weight.dtype)


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, C, H, W) -> (B, N, H, W), both channels last."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.conv2d(x.to(wide), weight.to(wide), bias.to(wide), padding=weight.shape[-1] // 2).relu_()
    return y.to(x.dtype, memory_format=torch.channels_last)


def products(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (P, C), weight (V, C), both of one half precision -> rows @ weight.T summed in fp32, (P, V)."""
    return rows.float() @ weight.float().t()


def exact_argmax(logits: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, slack: float) -> Tensor:
    """As the kernel: only columns within twice the error bound of the largest are computed again, in fp64."""
    logits = logits + bias  # (P, V)
    error = rows.float().norm(dim=1) * (slack * 1.001) + logits.abs().amax(1) * SUM_ERROR
    candidates = ~(logits < (logits.amax(1) - 2 * error)[:, None])
    row, column = candidates.nonzero(as_tuple=True)
    exact = torch.full(logits.shape, -torch.inf, dtype=torch.float64)
    for part in torch.arange(len(row)).split(4096):
        sums = (rows[row[part]].double() * weight[column[part]].double()).sum(1)
        exact[row[part], column[part]] = sums + bias[column[part]].double()
    return exact.argmax(1)
