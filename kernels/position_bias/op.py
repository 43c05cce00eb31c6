"""The operation `relative_position_bias`: schema, CPU implementation, dispatch and gradient."""

from __future__ import annotations

from typing import Any

import torch

from .. import backend
from . import reference
from .cpu import fold_bias, spread_table


def relative_position_bias(table: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """The additive bias of self-attention over a window of patches and one CLS token.

    Args:
        table: `relative_position_bias_table`, (R, H) with R = (2h - 1)(2w - 1) + 3; any floating dtype.
        window_size: (h, w), the patch grid; need not be square.

    Returns:
        (H, N, N) in the table's dtype, N = h * w + 1: the bias added to the score of query i and key j. Its gradient
        sums, for each row of the table, all pairs that read it, in a fixed order: deterministic on every device.

    Raises:
        ValueError: the table is not floating (R, H), or R does not fit the window.
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
    return torch.ops.beit_fast.relative_position_bias(table, height, width)


@torch.library.custom_op("beit_fast::relative_position_bias", mutates_args=())
def _spread(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if backend.triton_runs(table):
        from . import kernel

        return kernel.spread_table(table, height, width)
    return spread_table(table, height, width)


@_spread.register_fake
def _spread_fake(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    num_tokens = height * width + 1
    return table.new_empty(table.shape[1], num_tokens, num_tokens)


@torch.library.custom_op("beit_fast::relative_position_bias_backward", mutates_args=())
def _fold(grad_bias: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if backend.triton_runs(grad_bias):
        from . import kernel

        return kernel.fold_bias(grad_bias, height, width)
    return fold_bias(grad_bias, height, width)


@_fold.register_fake
def _fold_fake(grad_bias: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return grad_bias.new_empty(reference.table_rows((height, width)), grad_bias.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.height, ctx.width = inputs


def _backward(ctx: Any, grad_bias: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return torch.ops.beit_fast.relative_position_bias_backward(grad_bias, ctx.height, ctx.width), None, None


_spread.register_autograd(_backward, setup_context=_setup_context)
