"""`bias_gelu`: schema, dispatch, CPU kernel, autograd."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.backend import chosen_backend, triton_runs
from beit_fast.kernels.gelu import reference
from beit_fast.kernels.registration import differentiable_op, plain_op, traced

MAPPED_ANEW_BYTES = 32 << 20
"""glibc's DEFAULT_MMAP_THRESHOLD_MAX: it maps larger blocks of memory anew, page by page, every time."""
PIECE_BYTES = 4 << 20
"""Of the scratch in which a CPU then adds the bias: it stays in the cache until the next pass reads it."""


def bias_gelu(x: Tensor, bias: Tensor | None, may_overwrite: bool = False) -> Tensor:
    """The exact (erf) GELU of x + bias (Hendrycks & Gimpel 2016).

    Args:
        x: (..., D).
        bias: (D,) of the linear layer that gave x, where that layer did not add it, or None.
        may_overwrite: nobody else needs x, so that its memory may take the result where no gradient is computed.

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
    if chosen_backend() == "reference":
        return reference.bias_gelu(x, bias)
    if may_overwrite and bias is not None and _works_in_place(x, bias):
        return torch.ops.aten.gelu_(x.add_(bias))
    if _is_fastest_plain(x, bias):
        return F.gelu(x if bias is None else x + bias)
    return _gelu(x, bias)


def _is_fastest_plain(x: Tensor, bias: Tensor | None) -> bool:
    """On a CPU in eager mode: whether pieces save nothing, so that torch's own formula and gradient are best."""
    return (
        x.device.type == "cpu"
        and not traced(x)
        and not triton_runs(x)
        and (bias is None or (bias.dtype == x.dtype and x.numel() * x.element_size() <= MAPPED_ANEW_BYTES))
    )


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


def _pieces(x: Tensor, bias: Tensor) -> tuple[Tensor, range]:
    """Scratch for x + bias of some rows, in the dtype that both promote to, and the first rows of the pieces of x."""
    dtype = (
        x.dtype
        if bias.dtype == x.dtype
        else torch.promote_types(torch.promote_types(x.dtype, bias.dtype), torch.float32)
    )
    rows = min(len(x), max(PIECE_BYTES // max(x.shape[1] * dtype.itemsize, 1), 1))
    return x.new_empty((rows, x.shape[1]), dtype=dtype), range(0, len(x), max(rows, 1))


def _gelu_impl(x: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(x + bias)."""
    x = x.contiguous()
    if triton_runs(x):
        from beit_fast.kernels.gelu import kernel

        return kernel.bias_gelu_forward(x, bias)
    if bias is None:
        return torch.ops.aten.gelu(x)
    y = torch.empty_like(x)
    x_rows, y_rows = x.view(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    scratch, starts = _pieces(x_rows, bias)
    for start in starts:
        part = x_rows[start : start + len(scratch)]
        before = torch.add(part, bias, out=scratch[: len(part)])
        out = y_rows[start : start + len(scratch)]
        if before.dtype == y.dtype:
            torch.ops.aten.gelu.out(before, out=out)
        else:
            out.copy_(torch.ops.aten.gelu_(before))
    return y


def _gelu_fake(x: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _gelu_backward_impl(grad: Tensor, x: Tensor, bias: Tensor | None, need_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and, if `need_bias`, of the bias: (D,) in at least fp32, or empty."""
    grad, x = grad.contiguous(), x.contiguous()
    if triton_runs(x):
        from beit_fast.kernels.gelu import kernel

        return kernel.bias_gelu_backward(grad, x, bias, need_bias)
    if bias is None:
        return torch.ops.aten.gelu_backward(grad, x), x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    grad_x = torch.empty_like(x)
    rows = x.view(-1, x.shape[-1]), grad.view(-1, x.shape[-1]), grad_x.view(-1, x.shape[-1])
    scratch, starts = _pieces(rows[0], bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = x.new_empty((len(starts) if need_bias else 0, x.shape[-1]), dtype=wide)
    for piece, start in enumerate(starts):
        x_part, grad_part, out = (tensor[start : start + len(scratch)] for tensor in rows)
        before = torch.add(x_part, bias, out=scratch[: len(x_part)])
        if before.dtype == x.dtype:
            torch.ops.aten.gelu_backward.grad_input(grad_part, before, grad_input=out)
        else:
            torch.ops.aten.gelu_backward.grad_input(grad_part.to(before.dtype), before, grad_input=before)
            out.copy_(before)
        if need_bias:
            _column_sum(out if before.dtype == x.dtype else before, sums[piece])
    return grad_x, sums.sum(0) if need_bias else sums.view(-1)


def _column_sum(matrix: Tensor, out: Tensor) -> None:
    """(R, D) -> (D,), as a product with ones, which is faster than `sum(0)`."""
    if matrix.dtype == out.dtype:
        torch.mv(matrix.T, matrix.new_ones(len(matrix)), out=out)
    else:
        torch.sum(matrix, 0, dtype=out.dtype, out=out)


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
