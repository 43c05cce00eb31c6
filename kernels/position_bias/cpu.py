"""The relative position bias on CPU by moving whole runs of memory, rows first.

A bias over (query row, query column, key row, key column) depends on two differences only. In a strip laid out as
(query column, key row - query row, key column) the keys of one query row are a contiguous window of h * w elements: one
slice copy, or in the gradient one slice sum, serves a whole query row. What an index has left to do is h times smaller
than the bias.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .reference import table_rows


@functools.lru_cache(maxsize=16)
def _strip_index(height: int, width: int) -> Tensor:
    """The table row behind each element of the strip, int64 (w * (2h - 1) * w,)."""
    query_column = torch.arange(width)[:, None, None]
    step_down = torch.arange(2 * height - 1)[None, :, None]  # key row - query row + h - 1
    key_column = torch.arange(width)[None, None, :]
    row = (2 * height - 2 - step_down) * (2 * width - 1) + query_column - key_column + width - 1
    return row.flatten()


def _windows(strip: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    """The window (H, w, h * w) of each query row in a strip (H, w * (2h - 1) * w), overlapping views."""
    rows = strip.view(strip.shape[0], width, (2 * height - 1) * width)
    return rows.unfold(2, height * width, width).unbind(2)[::-1]


def spread_table(table: Tensor, height: int, width: int) -> Tensor:
    """(R, H) -> (H, N, N)."""
    num_tokens = height * width + 1
    strip = table.t().contiguous().index_select(1, _strip_index(height, width))
    bias = table.new_empty(table.shape[1], num_tokens, num_tokens)
    query_rows = bias[:, 1:, 1:].split(width, dim=1)
    for query_row, window in zip(query_rows, _windows(strip, height, width), strict=True):
        query_row.copy_(window)
    bias[:, 0, 1:] = table[-3][:, None]
    bias[:, 1:, 0] = table[-2][:, None]
    bias[:, 0, 0] = table[-1]
    return bias


def fold_bias(grad_bias: Tensor, height: int, width: int) -> Tensor:
    """(H, N, N) -> (R, H), summed in a fixed order in at least fp32."""
    num_heads = grad_bias.shape[0]
    grad = grad_bias.contiguous().to(torch.promote_types(grad_bias.dtype, torch.float32))
    strip = grad.new_zeros(num_heads, width * (2 * height - 1) * width)
    query_rows = grad[:, 1:, 1:].split(width, dim=1)
    torch._foreach_add_(_windows(strip, height, width), query_rows)  # one after the other: the windows overlap
    num_rows = table_rows((height, width))
    folded = grad.new_empty(num_rows, num_heads)
    pairs = grad.new_zeros(num_heads, num_rows - 3).index_add_(1, _strip_index(height, width), strip)
    folded[:-3] = pairs.t()
    folded[-3] = grad[:, 0, 1:].sum(1)
    folded[-2] = grad[:, 1:, 0].sum(1)
    folded[-1] = grad[:, 0, 0]
    return folded.to(grad_bias.dtype)
