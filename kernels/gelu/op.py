"""`bias_gelu`: schema, dispatch, CPU kernel, autograd."""

from typing import Any

import torch
from torch import Tensor

from ..backend import chosen_backend, triton_runs
from ..dispatch import differentiable_op, plain_op
from . import reference


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """The exact (erf) GELU of x + bias (Hendrycks & Gimpel 2016).

    Args:
        x: (..., D).
        bias: (D,) of the linear layer that gave x, where that layer did not add it, or None.

    Returns:
        (..., D) of the dtype of x.
    """
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must be (D,) = {tuple(x.shape[-1:])}, got {tuple(bias.shape)}")
    if chosen_backend() == "reference":
        return reference.bias_gelu(x, bias)
    return _gelu(x, bias)


def _biased(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias, in at least fp32 where the two are not of one dtype."""
    return x + bias if bias.dtype == x.dtype else x.to(torch.promote_types(x.dtype, torch.float32)) + bias


def _gelu_impl(x: Tensor, bias: Tensor | None) -> Tensor:
    x = x.contiguous()
    if triton_runs(x):
        from . import kernel

        return kernel.bias_gelu_forward(x, bias)
    if bias is None:
        return torch.ops.aten.gelu(x)
    return torch.ops.aten.gelu_(_biased(x, bias)).to(x.dtype)


def _gelu_fake(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _gelu_backward_impl(grad: Tensor, x: Tensor, bias: Tensor | None, need_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and of bias, the latter (D,) in at least fp32, empty unless `need_bias`."""
    grad, x = grad.contiguous(), x.contiguous()
    if triton_runs(x):
        from . import kernel

        return kernel.bias_gelu_backward(grad, x, bias, need_bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    if bias is None:
        grad_x = torch.ops.aten.gelu_backward(grad, x)
    else:
        # the gradient takes the place of x + bias: page faults of another buffer would cost more than the arithmetic
        grad_x = _biased(x, bias)
        torch.ops.aten.gelu_backward.grad_input(grad.to(grad_x.dtype), grad_x, grad_input=grad_x)
    grad_bias = _column_sum(grad_x.view(-1, x.shape[-1]), wide) if need_bias else grad_x.new_empty(0, dtype=wide)
    return grad_x.to(x.dtype), grad_bias


def _column_sum(matrix: Tensor, wide: torch.dtype) -> Tensor:
    """(R, D) -> (D,), as a product with ones, which is twice as fast as `sum(0)`."""
    return matrix.new_ones(matrix.shape[0]) @ matrix if matrix.dtype == wide else matrix.sum(0, dtype=wide)


def _gelu_backward_fake(grad: Tensor, x: Tensor, bias: Tensor | None, need_bias: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need_bias else 0, dtype=wide)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias = inputs
    ctx.save_for_backward(x, bias)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, bias = ctx.saved_tensors
    need_bias = bias is not None and ctx.needs_input_grad[1]
    grad_x, grad_bias = _gelu_backward(grad, x, bias, need_bias)
    return grad_x, grad_bias.to(bias.dtype) if need_bias else None


_gelu_backward = plain_op("bias_gelu_backward", _gelu_backward_impl, _gelu_backward_fake)
_gelu = differentiable_op("bias_gelu", _gelu_impl, _gelu_fake, _setup, _autograd)
