"""`residual_add` and `residual_layer_norm` in plain torch: for CPU, and for GPUs too old for our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from beit_fast.kernels.matmul import column_sums

_PIECE = 128
"""Rows of one weighted sum: few enough for its rounding not to show, many enough for a call to cost little."""


def residual_norm(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    branch_bias: Tensor | None,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sum, normed (B, N, D), mean, 1/std (B, N, 1) in at least fp32; the last three empty where weight is None."""
    if kept is not None:
        branch = whole(x, branch, kept)
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = gamma if drop_path is None else _scale(gamma, drop_path)
    wide_x, wide_branch = x.contiguous().to(wide), branch.contiguous().to(wide)
    if scale is None:
        total = wide_x + wide_branch
        if branch_bias is not None:
            total += branch_bias
    else:
        scale = scale.to(wide)
        total = torch.addcmul(wide_x, wide_branch, scale)
        if branch_bias is not None:
            total += scale * branch_bias  # (B, 1, D) at the most: cheaper than adding it to the branch
    total = total.to(x.dtype)
    if weight is None or bias is None:
        return total, branch.new_empty(0), x.new_empty(0, dtype=wide), x.new_empty(0, dtype=wide)
    normed, mean, rstd = torch.native_layer_norm(total.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return total, normed.to(branch.dtype), mean, rstd


def residual_norm_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    total: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    drop_path: Tensor | None,
    branch_bias: Tensor | None,
    kept: Tensor | None,
    branch_dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (x, branch, gamma, weight, bias, branch_bias), those of parameters wide; empty if not needed.

    Without `grad_normed` the sum alone was made, whose gradient is that of x.
    """
    _, need_branch, need_gamma, need_weight, need_bias, need_branch_bias = needs
    if grad_normed is None:
        assert grad_total is not None
        grad = grad_total.contiguous().to(torch.promote_types(grad_total.dtype, torch.float32))
        grad_x = grad_weight = grad_bias = grad.new_empty(0)
    else:
        assert total is not None
        assert weight is not None
        wide = torch.promote_types(total.dtype, torch.float32)
        grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad_normed.contiguous().to(wide), total.to(wide), total.shape[-1:], mean, rstd, weight.to(wide),
            weight.to(wide), [True, need_weight, need_bias],
        )  # fmt: skip
        if grad_total is not None:
            grad += grad_total
        grad_x = grad.to(total.dtype)
    grad_branch, grad_gamma, grad_branch_bias = (grad.new_empty(0, dtype=t) for t in (branch_dtype, None, None))
    if need_branch:
        scale = gamma if drop_path is None else _scale(gamma, drop_path)
        grad_branch = grad.to(branch_dtype, copy=True) if scale is None else (grad * scale).to(branch_dtype)
        if kept is not None:
            grad_branch = grad_branch.index_select(0, kept)
    if need_gamma or need_branch_bias:
        factors = grad.new_ones(grad.shape[:2].numel())
        if drop_path is not None:
            factors = drop_path.to(grad.dtype).repeat_interleave(grad.shape[1])
        rows = grad.flatten(0, 1)
        columns = grad.new_empty(0)
        if branch_bias is not None:
            columns = column_sums(rows, factors)
        if need_gamma:
            assert branch is not None
            if kept is not None:
                branch = whole(grad, branch, kept)
            grad_gamma = _weighted_column_sum(rows, branch.flatten(0, 1).to(grad.dtype), factors)
            if branch_bias is not None:
                grad_gamma += columns * branch_bias
        if need_branch_bias:
            grad_branch_bias = columns if gamma is None else columns * gamma
    return [
        grad_x,
        grad_branch,
        grad_gamma,
        grad_weight if need_weight else grad.new_empty(0),
        grad_bias if need_bias else grad.new_empty(0),
        grad_branch_bias,
    ]


def whole(x: Tensor, branch: Tensor, kept: Tensor) -> Tensor:
    """The branch (K, N, D) of the samples `kept`, with zeros for the others: (B, N, D)."""
    return branch.new_zeros(x.shape).index_copy(0, kept, branch)


def _scale(gamma: Tensor | None, drop_path: Tensor) -> Tensor:
    """drop_path * gamma, of a shape that broadcasts against (B, N, D)."""
    return drop_path[:, None, None] if gamma is None else drop_path[:, None, None] * gamma


def _weighted_column_sum(grad: Tensor, branch: Tensor, factors: Tensor) -> Tensor:
    """The sum over rows of factors * grad * branch, all (R, D), without a temporary of their size.

    It is the weight gradient of a LayerNorm of mean 0 and 1/std `factors`, which torch reduces in one pass: a pass for
    each piece of the rows, whose sums are added pairwise.
    """
    width = grad.shape[-1]
    zeros, weight = torch.zeros_like(factors), grad.new_ones(width)
    sums = [
        torch.ops.aten.native_layer_norm_backward(*piece[:2], [width], *piece[2:], weight, None, [False, True, False])[
            1
        ]
        for piece in zip(*(tensor.split(_PIECE) for tensor in (grad, branch, zeros, factors)), strict=True)
    ]
    return torch.stack(sums).sum(0)
