"""`residual_add` and `residual_layer_norm` in plain torch: for CPU, and for GPUs too old for our kernels."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from beit_fast.kernels.matmul import column_sums

_FEW_ROWS = 128
_CACHED_BYTES = 1 * 2**20  # of products that are made and summed at once


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
    wide = torch.promote_types(x.dtype, torch.float32)
    scale, wide_x, wide_branch = _scale(gamma, drop_path), x.contiguous().to(wide), branch.contiguous().to(wide)
    if scale is None:
        total = wide_x + wide_branch
        if branch_bias is not None:
            total += branch_bias
    else:
        scale = scale.to(wide)
        if kept is None:
            total = torch.addcmul(wide_x, wide_branch, scale)
        else:
            total = torch.empty_like(wide_x)
            for samples, rows in _runs(kept, len(x)):
                if rows is None:
                    total[samples].copy_(wide_x[samples])
                else:
                    torch.addcmul(wide_x[samples], wide_branch[rows], scale[samples], out=total[samples])
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
        scale = _scale(gamma, drop_path)
        if scale is None:
            grad_branch = grad.to(branch_dtype, copy=True)
        elif kept is None:
            grad_branch = (grad * scale).to(branch_dtype)
        else:
            wide_grad = grad.new_empty(len(kept), *grad.shape[1:])
            for samples, rows in _runs(kept, len(grad)):
                if rows is not None:
                    torch.mul(grad[samples], scale[samples], out=wide_grad[rows])
            grad_branch = wide_grad.to(branch_dtype)
    if need_gamma or need_branch_bias:
        factors = grad.new_ones(grad.shape[0]) if drop_path is None else drop_path.to(grad.dtype)
        columns = grad.new_empty(0) if branch_bias is None else _weighted_sum(grad, factors)
        if need_gamma:
            assert branch is not None
            grad_gamma = _weighted_sum_of_products(grad, branch, factors, kept)
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


def _scale(gamma: Tensor | None, drop_path: Tensor | None) -> Tensor | None:
    """drop_path * gamma, of a shape that broadcasts against (B, N, D)."""
    if drop_path is None:
        return gamma
    return drop_path[:, None, None] if gamma is None else drop_path[:, None, None] * gamma


def _runs(kept: Tensor | None, batch: int) -> list[tuple[slice, slice | None]]:
    """The batch in runs of samples that the branch has, with its rows, or that it has not, with None."""
    if kept is None:
        return [(slice(0, batch), slice(0, batch))]
    runs: list[tuple[slice, slice | None]] = []
    sample = row = 0
    for has, group in itertools.groupby(range(batch), set(kept.tolist()).__contains__):
        count = len(list(group))
        runs.append((slice(sample, sample + count), slice(row, row + count) if has else None))
        sample, row = sample + count, row + count if has else row
    return runs


def _weighted_sum(grad: Tensor, factors: Tensor) -> Tensor:
    """The sum over samples and tokens of factors (B,) * grad (B, N, D): (D,).

    It is summed over a sample's tokens first, so that its rounding does not grow with the batch; a few rows at once, as
    earlier versions did, whose small runs go on bit by bit.
    """
    if grad.shape[:2].numel() <= _FEW_ROWS:
        return column_sums(grad.flatten(0, 1), factors.repeat_interleave(grad.shape[1]))
    return factors @ grad.sum(1)


def _weighted_sum_of_products(grad: Tensor, branch: Tensor, factors: Tensor, kept: Tensor | None) -> Tensor:
    """The same of factors * grad * branch, the products of some samples at a time, as the cache holds."""
    batch, num_tokens, width = grad.shape
    if batch * num_tokens <= _FEW_ROWS and kept is None:
        # the weight gradient of a LayerNorm of mean 0 and 1/std `factors`
        rows, of_rows = grad.flatten(0, 1), factors.repeat_interleave(num_tokens)
        given = (rows, branch.flatten(0, 1).to(grad.dtype), [width], torch.zeros_like(of_rows), of_rows)
        return torch.ops.aten.native_layer_norm_backward(*given, rows.new_ones(width), None, [False, True, False])[1]
    most = max(1, _CACHED_BYTES // max(1, num_tokens * width * grad.itemsize))
    products, sums = grad.new_empty(min(most, batch), num_tokens, width), grad.new_zeros(batch, width)
    for samples, rows_of_branch in _runs(kept, batch):
        if rows_of_branch is None:
            continue
        for first in range(samples.start, samples.stop, most):
            some = slice(first, min(first + most, samples.stop))
            row = rows_of_branch.start + first - samples.start
            part = products[: some.stop - first]
            torch.mul(grad[some], branch[row : row + len(part)], out=part)
            torch.sum(part, 1, out=sums[some])
    return factors @ sums
