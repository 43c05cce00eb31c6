"""The relative position bias on CPU by moving whole runs of memory.

A bias over (query row, query column, key row, key column) depends on two differences only. In a strip laid out as
(query column, key row - query row, key column) the keys of one query row are a contiguous window of h * w elements: one
slice copy, or in the gradient one slice sum, serves a whole query row. What an index has left to do is h times smaller
than the bias.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .reference import relative_position_index, table_rows

_FEW_TOKENS = 256  # up to here one gather through the index of all pairs is as fast as anything


@functools.lru_cache(maxsize=16)
def _flat_index(height: int, width: int) -> Tensor:
    return relative_position_index((height, width)).flatten().cpu()


@functools.lru_cache(maxsize=16)
def _strip_index(height: int, width: int) -> Tensor:
    """The table row behind each element of the strip, and then of the row and of the column of CLS; int64, flat."""
    with torch.device("cpu"):  # whatever the default device
        query_column = torch.arange(width)[:, None, None]
        step_down = torch.arange(2 * height - 1)[None, :, None]  # key row - query row + h - 1
        key_column = torch.arange(width)[None, None, :]
        strip = (2 * height - 2 - step_down) * (2 * width - 1) + query_column - key_column + width - 1
        num_rows, num_patches = table_rows((height, width)), height * width
        from_cls = torch.full((num_patches,), num_rows - 3)
        to_cls = torch.full((num_patches,), num_rows - 2)
        return torch.cat((strip.flatten(), torch.tensor([num_rows - 1]), from_cls, to_cls))


def _windows(strip: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    """The window (H, w, h * w) of each query row in a strip (H, w * (2h - 1) * w), overlapping views."""
    rows = strip.unflatten(1, (width, (2 * height - 1) * width))
    return rows.unfold(2, height * width, width).unbind(2)[::-1]


def _parts(height: int, width: int) -> list[int]:
    """Sizes of the strip, and of the row and the rest of the column of CLS."""
    return [width * (2 * height - 1) * width, height * width + 1, height * width]


def spread_table(table: Tensor, height: int, width: int) -> Tensor:
    """(R, H) -> (H, N, N)."""
    num_tokens = height * width + 1
    heads_first = table.t().contiguous()
    if num_tokens <= _FEW_TOKENS:
        return heads_first.index_select(1, _flat_index(height, width)).unflatten(1, (num_tokens, num_tokens))
    strip, from_cls, to_cls = heads_first.index_select(1, _strip_index(height, width)).split(_parts(height, width), 1)
    bias = table.new_empty(table.shape[1], num_tokens, num_tokens)
    query_rows = bias[:, 1:, 1:].split(width, dim=1)
    for query_row, window in zip(query_rows, _windows(strip, height, width), strict=True):
        query_row.copy_(window)
    bias[:, 0] = from_cls
    bias[:, 1:, 0] = to_cls
    return bias


def fold_bias(grad_bias: Tensor, height: int, width: int) -> Tensor:
    """(H, N, N) -> (R, H), summed in a fixed order in at least fp32."""
    num_heads = grad_bias.shape[0]
    grad = grad_bias.contiguous().to(torch.promote_types(grad_bias.dtype, torch.float32))
    index = _strip_index(height, width)
    gathered = grad.new_zeros(num_heads, len(index))
    strip, from_cls, to_cls = gathered.split(_parts(height, width), dim=1)
    # one query row after the other: on a CPU a _foreach_ is a plain loop, so that the windows may overlap
    torch._foreach_add_(_windows(strip, height, width), grad[:, 1:, 1:].split(width, dim=1))
    from_cls.copy_(grad[:, 0])
    to_cls.copy_(grad[:, 1:, 0])
    folded = grad.new_zeros(num_heads, table_rows((height, width))).index_add_(1, index, gathered)
    return folded.t().contiguous().to(grad_bias.dtype)
