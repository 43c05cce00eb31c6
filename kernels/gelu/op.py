"""The operation `bias_gelu`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.backend import select
from beit_fast.kernels.gelu import cpu, reference
from beit_fast.kernels.registration import fused_op, is_traced


def bias_gelu(x: Tensor, bias: Tensor | None, may_overwrite: bool = False) -> Tensor:
    """The exact (erf) GELU of x + bias (Hendrycks & Gimpel 2016).

    Args:
        x: (..., D).
        bias: (D,) of the linear layer that gave x, where that layer did not add it, or None.
        may_overwrite: x is not needed afterwards, nor by the gradient of what made it: its memory may take x + bias,
            and the result where no gradient is computed.

    Returns:
        (..., D) of the dtype of x.

    Raises:
        ValueError: the bias is not (D,).

    Examples:
        >>> import torch
        >>> from beit_fast.kernels import bias_gelu
        >>> bias_gelu(torch.zeros(2, 4), torch.ones(4))[0, 0]
        tensor(0.8413)
    """
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must be (D,) = {tuple(x.shape[-1:])}, got {tuple(bias.shape)}")
    backend = select("bias_gelu", x)
    if backend == "reference":
        return reference.bias_gelu(x, bias)
    if backend == "cpu" and not is_traced(x) and (bias is None or bias.dtype == x.dtype):
        overwrite = may_overwrite and x.is_contiguous() and not (x.is_leaf and x.requires_grad)
        if overwrite and bias is not None and not torch.is_grad_enabled():
            return torch.ops.aten.gelu_(x.add_(bias))  # a new block of memory costs more than the GELU itself
        if bias is None or x.nbytes <= cpu.MAPPED_ANEW_BYTES:  # pieces save nothing
            if bias is not None:
                x = x.add_(bias) if overwrite else x + bias
            return F.gelu(x)
    return _bias_gelu(x, bias, backend)


def _fake(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@fused_op("beit_fast::bias_gelu", fake=_fake)
def _bias_gelu(x: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    if backend == "triton":
        from beit_fast.kernels.gelu import kernel

        return kernel.bias_gelu(x.contiguous(), bias)
    return cpu.bias_gelu(x.contiguous(), bias)


def _backward_fake(
    grad: Tensor, x: Tensor, bias: Tensor | None, need_bias: bool, backend: str
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need_bias else 0, dtype=wide)


@fused_op("beit_fast::bias_gelu_backward", fake=_backward_fake)
def _bias_gelu_backward(
    grad: Tensor, x: Tensor, bias: Tensor | None, need_bias: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x and, if `need_bias`, of the bias: (D,) in at least fp32, or empty."""
    grad, x = grad.contiguous(), x.contiguous()
    if backend == "triton":
        from beit_fast.kernels.gelu import kernel

        return kernel.bias_gelu_backward(grad, x, bias, need_bias)
    return cpu.bias_gelu_backward(grad, x, bias, need_bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.backend = inputs
    ctx.save_for_backward(x, bias)


@_bias_gelu.backward(_save)
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, bias = ctx.saved_tensors
    need_bias = bias is not None and ctx.needs_input_grad[1]
    grad_x, grad_bias = _bias_gelu_backward(grad, x, bias, need_bias, ctx.backend)
    return grad_x, grad_bias.to(bias.dtype) if need_bias else None, None
