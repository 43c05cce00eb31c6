"""The operation `relative_position_bias`: schema, CPU implementation, dispatch and gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from beit_fast.kernels import backend
from beit_fast.kernels.position_bias import cpu, reference
from beit_fast.kernels.registration import differentiable_op, plain_op, traced


def relative_position_bias(table: Tensor, window_size: tuple[int, int]) -> Tensor:
    """The additive bias of self-attention over a window of patches and one CLS token.

    Args:
        table: `relative_position_bias_table`, (R, H) with R = (2h - 1)(2w - 1) + 3; any floating dtype.
        window_size: (h, w), the patch grid; need not be square.

    Returns:
        (H, N, N) in the table's dtype, N = h * w + 1: the bias added to the score of query i and key j. Its gradient
        sums, for each row of the table, all pairs that read it, in a fixed order: deterministic on every device.

    Raises:
        ValueError: the table is not floating (R, H), or R does not fit the window.

    Examples:
        >>> import torch
        >>> from beit_fast.kernels import relative_position_bias
        >>> relative_position_bias(torch.zeros(27 * 27 + 3, 12), (14, 14)).shape
        torch.Size([12, 197, 197])
    """
    height, width = window_size
    if height < 1 or width < 1:
        raise ValueError(f"window_size must be two positive integers, got {tuple(window_size)}")
    if table.dim() != 2 or not table.is_floating_point():
        raise ValueError(f"table must be floating (R, H), got {table.dtype} {tuple(table.shape)}")
    expected = reference.table_rows((height, width))
    if table.shape[0] != expected:
        raise ValueError(
            f"table has {table.shape[0]} rows but a window of {height} x {width} needs {expected}; "
            "resize it with beit_fast.models.resize_relative_position_bias_table"
        )
    if backend.chosen_backend() == "reference":
        return reference.relative_position_bias(table, (height, width))
    small_on_cpu = table.device.type == "cpu" and height * width <= cpu.FEW_PATCHES
    if small_on_cpu and not traced(table) and not backend.triton_runs(table):
        return cpu.index_pairs(table, height, width)
    return _spread(table, height, width)


def _spread_impl(table: Tensor, height: int, width: int) -> Tensor:
    if backend.triton_runs(table):
        from beit_fast.kernels.position_bias import kernel

        return kernel.gather_bias(table, height, width)
    if table.device.type != "cpu":
        return reference.relative_position_bias(table, (height, width))
    return cpu.gather_bias(table, height, width)


def _spread_fake(table: Tensor, height: int, width: int) -> Tensor:
    num_tokens = height * width + 1
    return table.new_empty(table.shape[1], num_tokens, num_tokens)


def _fold_impl(grad_bias: Tensor, height: int, width: int) -> Tensor:
    if backend.triton_runs(grad_bias):
        from beit_fast.kernels.position_bias import kernel

        return kernel.scatter_table_grad(grad_bias, height, width)
    if grad_bias.device.type != "cpu":
        index = reference.relative_position_index((height, width)).to(grad_bias.device)
        folded = grad_bias.new_zeros(reference.table_rows((height, width)), grad_bias.shape[0])
        return folded.index_put_((index,), grad_bias.permute(1, 2, 0), accumulate=True)
    return cpu.scatter_table_grad(grad_bias, height, width)


def _fold_fake(grad_bias: Tensor, height: int, width: int) -> Tensor:
    return grad_bias.new_empty(reference.table_rows((height, width)), grad_bias.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.height, ctx.width = inputs


def _autograd(ctx: Any, grad_bias: Tensor) -> tuple[Tensor, None, None]:
    return _fold(grad_bias, ctx.height, ctx.width), None, None


_fold = plain_op("relative_position_bias_backward", _fold_impl, _fold_fake)
_spread = differentiable_op("relative_position_bias", _spread_impl, _spread_fake, _setup, _autograd)
