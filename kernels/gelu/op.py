"""The operation `bias_gelu`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beit_fast.kernels import compiled
from beit_fast.kernels.backend import compiled_serves, select
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
    traced = is_traced(x)
    overwrite = may_overwrite and not traced and x.is_contiguous() and not (x.is_leaf and x.requires_grad)
    saves = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if backend == "triton" or (saves and backend == "cpu" and not traced and compiled_serves(x, bias)):
        return _bias_gelu(x, bias, overwrite, backend)[0]
    return cpu.bias_gelu(x, bias, overwrite)


def _fake(x: Tensor, bias: Tensor | None, overwrite: bool, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if backend == "cpu" else 0)


@fused_op("beit_fast::bias_gelu", fake=_fake)
def _bias_gelu(x: Tensor, bias: Tensor | None, overwrite: bool, backend: str) -> tuple[Tensor, Tensor]:
    """The result and, on a CPU, the derivative, which the gradient wants kept instead of x; on a GPU nothing."""
    if backend == "triton":
        from beit_fast.kernels.gelu import kernel

        return kernel.bias_gelu(x.contiguous(), bias), x.new_empty(0)
    return compiled.bias_gelu(x, bias, overwrite)


def _backward_fake(
    grad: Tensor, x: Tensor | None, bias: Tensor | None, derivative: Tensor | None, need_bias: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape[-1] if need_bias else 0, dtype=wide)


@fused_op("beit_fast::bias_gelu_backward", fake=_backward_fake)
def _bias_gelu_backward(
    grad: Tensor, x: Tensor | None, bias: Tensor | None, derivative: Tensor | None, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and, if `need_bias`, of the bias: (D,) in at least fp32, or empty."""
    if derivative is not None:
        return compiled.bias_gelu_backward(grad, derivative, need_bias)
    from beit_fast.kernels.gelu import kernel

    assert x is not None
    return kernel.bias_gelu_backward(grad.contiguous(), x.contiguous(), bias, need_bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, _, backend = inputs
    derivative = output[1]
    ctx.mark_non_differentiable(derivative)
    ctx.set_materialize_grads(False)  # no zeros for the derivative
    ctx.save_for_backward(*((x, bias, None) if backend == "triton" else (None, bias, derivative)))


@_bias_gelu.backward(_save)
def _gradients(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    x, bias, derivative = ctx.saved_tensors
    need_bias = bias is not None and ctx.needs_input_grad[1]
    grad_x, grad_bias = _bias_gelu_backward(grad, x, bias, derivative, need_bias)
    return grad_x, grad_bias.to(bias.dtype) if need_bias else None, None, None
