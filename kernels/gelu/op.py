"""`bias_gelu`: schema, dispatch, CPU kernel, autograd."""

from typing import Any

import torch
from torch import Tensor

from ..backend import chosen_backend, triton_runs
from ..dispatch import differentiable_op, plain_op
from . import reference

MAPPED_ANEW_BYTES = 32 << 20  # glibc: DEFAULT_MMAP_THRESHOLD_MAX


def bias_gelu(x: Tensor, bias: Tensor | None, may_overwrite: bool = False) -> Tensor:
    """The exact (erf) GELU of x + bias (Hendrycks & Gimpel 2016).

    Args:
        x: (..., D).
        bias: (D,) of the linear layer that gave x, where that layer did not add it, or None.
        may_overwrite: nobody else needs x, so that its memory may take the result where no gradient is computed.

    Returns:
        (..., D) of the dtype of x.
    """
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must be (D,) = {tuple(x.shape[-1:])}, got {tuple(bias.shape)}")
    if chosen_backend() == "reference":
        return reference.bias_gelu(x, bias)
    if may_overwrite and bias is not None and _works_in_place(x, bias):
        return torch.ops.aten.gelu_(x.add_(bias))
    return _gelu(x, bias, _keeps_sum(x, bias))[0]


def _works_in_place(x: Tensor, bias: Tensor) -> bool:
    """On a CPU in inference: a new block of memory costs more than the GELU itself."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dtype == bias.dtype
        and x.is_contiguous()
        and not triton_runs(x)
    )


def _keeps_sum(x: Tensor, bias: Tensor | None) -> bool:
    """Whether the backward pass gets x + bias as it is, or adds it up again in the buffer that then takes the gradient.

    On a CPU one addition more is cheaper than one more block of memory where that is mapped anew, page by page, every
    time, which is so above the C library's limit.
    """
    if x.device.type != "cpu" or bias is None or bias.dtype != x.dtype or triton_runs(x):
        return False
    return (
        torch.is_grad_enabled()
        and (x.requires_grad or bias.requires_grad)
        and x.numel() * x.element_size() <= MAPPED_ANEW_BYTES
    )


def _biased(x: Tensor, bias: Tensor) -> Tensor:
    """x + bias, in at least fp32 where the two are not of one dtype."""
    return x + bias if bias.dtype == x.dtype else x.to(torch.promote_types(x.dtype, torch.float32)) + bias


def _gelu_impl(x: Tensor, bias: Tensor | None, keep_sum: bool) -> tuple[Tensor, Tensor]:
    """gelu(x + bias); and x + bias if `keep_sum`, else an empty tensor."""
    x = x.contiguous()
    if triton_runs(x):
        from . import kernel

        return kernel.bias_gelu_forward(x, bias), x.new_empty(0)
    if bias is None:
        return torch.ops.aten.gelu(x), x.new_empty(0)
    before = _biased(x, bias)
    if keep_sum:
        return torch.ops.aten.gelu(before), before
    return torch.ops.aten.gelu_(before).to(x.dtype), x.new_empty(0)


def _gelu_fake(x: Tensor, bias: Tensor | None, keep_sum: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if keep_sum else 0)


def _gelu_backward_impl(grad: Tensor, x: Tensor, bias: Tensor | None, need_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and, if `need_bias`, of what was or is added to it: (D,) in at least fp32, or empty.

    Args:
        x, bias: as given, or their sum and None.
    """
    grad, x = grad.contiguous(), x.contiguous()
    if triton_runs(x):
        from . import kernel

        return kernel.bias_gelu_backward(grad, x, bias, need_bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    if bias is None:
        grad_x = torch.ops.aten.gelu_backward(grad, x)
    else:
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, bias, keep_sum = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for it either
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*((output[1], None) if keep_sum else (x, bias)))


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    if grad is None:
        return None, None, None
    x, bias = ctx.saved_tensors
    need_bias = ctx.bias_dtype is not None and ctx.needs_input_grad[1]
    grad_x, grad_bias = _gelu_backward(grad, x, bias, need_bias)
    return grad_x, grad_bias.to(ctx.bias_dtype) if need_bias else None, None


_gelu_backward = plain_op("bias_gelu_backward", _gelu_backward_impl, _gelu_backward_fake)
_gelu = differentiable_op("bias_gelu", _gelu_impl, _gelu_fake, _setup, _autograd)
