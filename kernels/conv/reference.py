"""The definitions: one formula each, in at least fp32, rounded once at the end."""

import torch
import torch.nn.functional as F
from torch import Tensor


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """x (..., C), bias (C,) -> relu(x + bias)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.relu(x.to(wide) + bias.to(wide)).to(x.dtype)


def pool_bias_relu(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, H, W, C), bias (C,) -> y = max over 2 x 2 pixels + bias, (B, H/2, W/2, C), and relu(y)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    B, H, W, C = x.shape
    y = x.to(wide).view(B, H // 2, 2, W // 2, 2, C).amax((2, 4)) + bias.to(wide)
    return y.to(x.dtype), F.relu(y).to(x.dtype)


def pixel_conv(images: Tensor, weight: Tensor, bias: Tensor, scale: float, shift: float) -> tuple[Tensor, Tensor]:
    """images (B, 3, H, W) -> y = conv(scale * images + shift) + bias, (B, H, W, N), and relu(y)."""
    wide = torch.promote_types(images.dtype, torch.float32)
    pixels = (scale * images.to(wide) + shift).to(weight.dtype).to(wide)
    y = F.conv2d(pixels, weight.to(wide), bias.to(wide), padding=weight.shape[-1] // 2).permute(0, 2, 3, 1)
    return y.to(weight.dtype).contiguous(), F.relu(y).to(weight.dtype).contiguous()


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, C, H, W), weight (N, C, k, k), bias (N,) -> relu(conv(x) + bias), (B, N, H, W)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = F.conv2d(x.to(wide), weight.to(wide), bias.to(wide), padding=weight.shape[-1] // 2)
    return F.relu(y).to(x.dtype)


def exact_argmax(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """rows (P, C), weight (V, C), bias (V,) -> argmax of rows @ weight.T + bias, computed in fp64: int64 (P,)."""
    return torch.addmm(bias.double(), rows.double(), weight.double().t()).argmax(1)
