"""`bias_gelu` in plain torch, a piece of the rows at a time where the memory of a whole pass would be mapped anew."""

from __future__ import annotations

import torch
from torch import Tensor

MAPPED_ANEW_BYTES = 32 << 20
"""glibc's DEFAULT_MMAP_THRESHOLD_MAX: it maps larger blocks of memory anew, page by page, every time."""
PIECE_BYTES = 4 << 20
"""Of the scratch in which the bias is then added: it stays in the cache until the next pass reads it."""


def _pieces(x: Tensor, bias: Tensor) -> tuple[Tensor, range]:
    """Scratch for x + bias of some rows, in the dtype that both promote to, and the first rows of the pieces of x."""
    dtype = torch.promote_types(x.dtype, bias.dtype)
    if bias.dtype != x.dtype:
        dtype = torch.promote_types(dtype, torch.float32)
    rows = min(len(x), max(PIECE_BYTES // max(x.shape[1] * dtype.itemsize, 1), 1))
    return x.new_empty((rows, x.shape[1]), dtype=dtype), range(0, len(x), max(rows, 1))


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., D) contiguous, bias (D,) or None -> (..., D)."""
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


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, need_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and of bias (D,) in at least fp32, the latter empty unless `need_bias`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if bias is None:
        return torch.ops.aten.gelu_backward(grad, x), x.new_empty(0, dtype=wide)
    grad_x = torch.empty_like(x)
    rows = x.view(-1, x.shape[-1]), grad.view(-1, x.shape[-1]), grad_x.view(-1, x.shape[-1])
    scratch, starts = _pieces(rows[0], bias)
    sums = x.new_empty((len(starts) if need_bias else 0, x.shape[-1]), dtype=wide)
    for piece, start in enumerate(starts):
        x_part, grad_part, out = (tensor[start : start + len(scratch)] for tensor in rows)
        before = torch.add(x_part, bias, out=scratch[: len(x_part)])
        if before.dtype == x.dtype:
            torch.ops.aten.gelu_backward.grad_input(grad_part, before, grad_input=out)
            before = out
        else:
            torch.ops.aten.gelu_backward.grad_input(grad_part.to(before.dtype), before, grad_input=before)
            out.copy_(before)
        if need_bias and before.dtype == wide:  # as a product with ones, which is faster than `sum(0)`
            torch.mv(before.T, before.new_ones(len(before)), out=sums[piece])
        elif need_bias:
            torch.sum(before, 0, dtype=wide, out=sums[piece])
    return grad_x, sums.sum(0) if need_bias else sums.view(-1)
