"""The operation `relative_position_bias`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from beit_fast.kernels.backend import select
from beit_fast.kernels.position_bias import cpu, reference
from beit_fast.kernels.registration import fused_op, is_traced


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
    expected = (2 * height - 1) * (2 * width - 1) + 3
    if table.shape[0] != expected:
        raise ValueError(
            f"table has {table.shape[0]} rows but a window of {height} x {width} needs {expected}; "
            "resize it with beit_fast.models.resize_relative_position_bias_table"
        )
    backend = select("relative_position_bias", table)
    if backend in ("reference", "torch"):
        return reference.relative_position_bias(table, (height, width))
    if backend == "cpu" and height * width <= cpu.FEW_PATCHES and not is_traced(table):
        return cpu.index_pairs(table, height, width)
    return _relative_position_bias(table, height, width, backend)


def _fake(table: Tensor, height: int, width: int, backend: str) -> Tensor:
    num_tokens = height * width + 1
    return table.new_empty(table.shape[1], num_tokens, num_tokens)


@fused_op("beit_fast::relative_position_bias", fake=_fake)
def _relative_position_bias(table: Tensor, height: int, width: int, backend: str) -> Tensor:
    if backend == "triton":
        from beit_fast.kernels.position_bias import kernel

        return kernel.gather_bias(table, height, width)
    return cpu.gather_bias(table, height, width)


def _backward_fake(grad_bias: Tensor, height: int, width: int, backend: str) -> Tensor:
    return grad_bias.new_empty(reference.table_rows((height, width)), grad_bias.shape[0])


@fused_op("beit_fast::relative_position_bias_backward", fake=_backward_fake)
def _relative_position_bias_backward(grad_bias: Tensor, height: int, width: int, backend: str) -> Tensor:
    if backend == "triton":
        from beit_fast.kernels.position_bias import kernel

        return kernel.scatter_table_grad(grad_bias, height, width)
    return cpu.scatter_table_grad(grad_bias, height, width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *ctx.others = inputs


@_relative_position_bias.backward(_save)
def _gradients(ctx: Any, grad_bias: Tensor) -> tuple[Tensor, None, None, None]:
    return _relative_position_bias_backward(grad_bias, *ctx.others), None, None, None
