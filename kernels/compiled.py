"""The CPU kernels of `csrc/`, which stand in for the plain torch of an op's `cpu.py` where `compiled_serves` says so.

Each takes one pass over memory where torch takes several; a step on a CPU waits for memory between its products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from beit_fast.kernels.backend import compiled_module


def _sums(x: Tensor, count: int) -> Tensor:
    """Memory for `count` sums over the rows of x (..., D): (count, pieces, D)."""
    rows = x.numel() // x.shape[-1]
    return x.new_empty(count, -(-rows // compiled_module().ROWS_PER_SUM), x.shape[-1])


def bias_gelu(x: Tensor, bias: Tensor | None, overwrite: bool) -> tuple[Tensor, Tensor]:
    """x (..., D), bias (D,) or None -> GELU (..., D), and the derivative there, in the memory of x with `overwrite`."""
    value, derivative = torch.empty_like(x), x.detach() if overwrite else torch.empty_like(x)
    compiled_module().bias_gelu(x, bias, value, derivative, torch.get_num_threads())
    if overwrite:
        torch.autograd.graph.increment_version(x)  # so that autograd finds out where another op has saved x
    return value, derivative


def bias_gelu_backward(grad: Tensor, derivative: Tensor, need_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and of the bias (D,), the latter empty unless `need_bias`."""
    grad = grad.contiguous()
    grad_x, sums = torch.empty_like(grad), _sums(grad, 1)
    compiled_module().bias_gelu_backward(grad, derivative, grad_x, sums, torch.get_num_threads())
    return grad_x, sums.sum((0, 1)) if need_bias else grad.new_empty(0)


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
    """As `residual_norm.cpu.residual_norm`."""
    rows = 0 if weight is None else (*x.shape[:2], 1)
    total, normed = torch.empty_like(x), x.new_empty(0 if weight is None else x.shape)
    mean, rstd = x.new_empty(rows), x.new_empty(rows)
    kept = None if kept is None else kept.contiguous()
    inputs = (x, branch, gamma, drop_path, branch_bias, kept, weight, bias)
    compiled_module().residual_norm(*inputs, eps, total, normed, mean, rstd, torch.get_num_threads())
    return total, normed, mean, rstd


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
    needs: list[bool],
) -> list[Tensor]:
    """As `residual_norm.cpu.residual_norm_backward`."""
    _, need_branch, need_gamma, need_weight, need_bias, need_branch_bias = needs
    stream = grad_total if grad_normed is None else grad_normed
    assert stream is not None
    nothing, sums = stream.new_empty(0), _sums(stream, 4)
    grad_x = nothing if grad_normed is None else torch.empty_like(stream)
    samples = stream.shape[0] if kept is None else kept.shape[0]
    grad_branch = stream.new_empty(samples if need_branch else 0, *stream.shape[1:])
    kept = None if kept is None else kept.contiguous()
    inputs = (grad_total, grad_normed, total, mean, rstd, weight, branch, gamma, drop_path, kept)
    outputs = (grad_x, grad_branch if need_branch else None, sums)
    compiled_module().residual_norm_backward(*inputs, *outputs, torch.get_num_threads())
    # an op's results share no memory: four sums, not the rows of one
    grad_weight = sums[0].sum(0) if need_weight else nothing
    grad_bias = sums[1].sum(0) if need_bias else nothing
    grad_gamma = sums[2].sum(0) if need_gamma else nothing
    grad_branch_bias, columns = nothing, sums[3].sum(0)
    if need_gamma and branch_bias is not None:
        grad_gamma += columns * branch_bias
    if need_branch_bias:
        grad_branch_bias = columns if gamma is None else columns * gamma
    return [grad_x, grad_branch if need_branch else nothing, grad_gamma, grad_weight, grad_bias, grad_branch_bias]
