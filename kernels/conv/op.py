"""Operations of an encoder of convolutions; none has a gradient, tokenizers are frozen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from beit_fast.kernels.backend import select
from beit_fast.kernels.conv import cpu, reference
from beit_fast.kernels.registration import fused_op


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """relu(x + bias) in one pass.

    Args:
        x: (..., C).
        bias: (C,), fp32.

    Returns:
        (..., C) of the dtype of x.
    """
    backend = select("bias_relu", x)
    return reference.bias_relu(x, bias) if backend == "reference" else _bias_relu(x, bias, backend)


@fused_op("beit_fast::bias_relu", fake=lambda x, bias, backend: x.new_empty(x.shape))
def _bias_relu(x: Tensor, bias: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        from beit_fast.kernels.conv import kernel

        return kernel.bias_relu(x.contiguous(), bias)
    return cpu.bias_relu(x, bias)


def pool_bias_relu(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of 2 x 2 pixels plus a bias, and that rectified, in one pass.

    Args:
        x: (B, H, W, C), H and W even.
        bias: (C,), fp32.

    Returns:
        y and relu(y), each (B, H/2, W/2, C) of the dtype of x.

    Raises:
        ValueError: H or W is odd.
    """
    if x.shape[1] % 2 or x.shape[2] % 2:
        raise ValueError(f"x must be (B, H, W, C) with even H and W, got {tuple(x.shape)}")
    backend = select("pool_bias_relu", x)
    return reference.pool_bias_relu(x, bias) if backend == "reference" else _pool_bias_relu(x, bias, backend)


def _pool_fake(x: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3])
    return x.new_empty(shape), x.new_empty(shape)


@fused_op("beit_fast::pool_bias_relu", fake=_pool_fake)
def _pool_bias_relu(x: Tensor, bias: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from beit_fast.kernels.conv import kernel

        return kernel.pool_bias_relu(x.contiguous(), bias)
    return cpu.pool_bias_relu(x, bias)


def pixel_conv(images: Tensor, weight: Tensor, bias: Tensor, scale: float, shift: float) -> tuple[Tensor, Tensor]:
    """The "same" convolution of scale * images + shift, and that rectified, as one gathered matrix product.

    Args:
        images: (B, C, H, W), fp32, few channels; the border is padded with zeros after scale and shift.
        weight: (N, C, k, k), k odd; its dtype is that of the pixels that are multiplied, and of the results.
        bias: (N,), fp32.
        scale, shift: of the pixels.

    Returns:
        y and relu(y), each (B, H, W, N).
    """
    backend = select("pixel_conv", images)
    if backend == "reference":
        return reference.pixel_conv(images, weight, bias, scale, shift)
    return _pixel_conv(images, weight, bias, scale, shift, backend)


def _pixel_fake(
    images: Tensor, weight: Tensor, bias: Tensor, scale: float, shift: float, backend: str
) -> tuple[Tensor, Tensor]:
    shape = (images.shape[0], *images.shape[2:], weight.shape[0])
    return weight.new_empty(shape), weight.new_empty(shape)


@fused_op("beit_fast::pixel_conv", fake=_pixel_fake)
def _pixel_conv(
    images: Tensor, weight: Tensor, bias: Tensor, scale: float, shift: float, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from beit_fast.kernels.conv import kernel

        return kernel.pixel_conv(images.contiguous(), weight.contiguous(), bias, scale, shift)
    return cpu.pixel_conv(images, weight, bias, scale, shift)


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(conv(x) + bias), a "same" convolution: on a GPU with cuDNN's own bias and ReLU.

    Args:
        x: (B, C, H, W), channels last.
        weight: (N, C, k, k), k odd, of the dtype of x, channels last.
        bias: (N,), of the dtype of x.

    Returns:
        (B, N, H, W), channels last.
    """
    if not x.is_cuda:
        return cpu.conv_relu(x, weight, bias)
    pad = [weight.shape[-1] // 2] * 2
    return torch.ops.aten.cudnn_convolution_relu(x, weight, bias, [1, 1], pad, [1, 1], 1)


class ExactHead(NamedTuple):
    """A linear layer to a vocabulary, and a copy in half precision with what is known of its error."""

    weight: Tensor
    """(V, C) fp32."""
    bias: Tensor
    """(V,) fp32."""
    half: Tensor
    """(V, C) in the dtype of the rows."""
    slack: float
    """Bound of the error of a half-precision product, as a share of the row's norm."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> ExactHead:
        """Prepare the layer for rows of `dtype`.

        By Cauchy-Schwarz a product x w errs by at most |x| |w - half(w)| for the rounding of the weights, and by
        C * SUM_ERROR * |x| |half(w)| for C additions; the norms are taken in fp64, the largest of all columns counts.
        """
        half = weight.to(dtype)
        rounding = (weight.double() - half.double()).norm(dim=1).amax()
        summing = weight.shape[1] * cpu.SUM_ERROR * half.double().norm(dim=1).amax()
        return cls(weight.contiguous(), bias.contiguous(), half.contiguous(), float(rounding + summing))


def exact_argmax(rows: Tensor, head: ExactHead, max_bytes: int) -> Tensor:
    """The arg-max of rows @ weight.T + bias as fp64 has it, at the price of a product in half precision.

    Columns whose logit is within twice the proven error bound of the row's largest are computed again in fp64.

    Args:
        rows: (P, C), of the dtype of `head.half`.
        head: the layer.
        max_bytes: of fp32 logits that exist at a time.

    Returns:
        int64 (P,).
    """
    backend = select("exact_argmax", rows)
    if backend == "reference":
        return reference.exact_argmax(rows, head.weight, head.bias)
    count = max(1, max_bytes // (4 * len(head.bias)))
    parts = [_exact_argmax(part, *head, backend) for part in rows.contiguous().split(count)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@fused_op("beit_fast::exact_argmax", fake=lambda rows, *_: rows.new_empty(rows.shape[0], dtype=torch.int64))
def _exact_argmax(
    rows: Tensor, weight: Tensor, bias: Tensor, half: Tensor, slack: float, backend: str
) -> Tensor:  # fmt: skip
    # fp32 results: sums of parts of the product in half precision would break the bound
    logits = torch.mm(rows, half.t(), out_dtype=torch.float32) if rows.is_cuda else cpu.products(rows, half)
    if backend == "triton":
        from beit_fast.kernels.conv import kernel

        return kernel.exact_argmax(logits, rows, weight, bias, slack, cpu.SUM_ERROR)
    return cpu.exact_argmax(logits, rows, weight, bias, slack)
