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

from .reference import table_rows


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
    """The window (H, w, h * w) of each query row in strips (H, w * (2h - 1) * w + ...), overlapping views."""
    strides = (width, strip.stride(0), (2 * height - 1) * width, 1)
    return strip.as_strided((height, strip.shape[0], width, height * width), strides).unbind(0)[::-1]


def _query_rows(bias: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
    """The (H, w, h * w) of each query row in a contiguous bias (H, N, N), without CLS."""
    num_heads, num_tokens, _ = bias.shape
    strides = (width * num_tokens, num_tokens**2, num_tokens, 1)
    first = bias.storage_offset() + num_tokens + 1
    return bias.as_strided((height, num_heads, width, height * width), strides, first).unbind(0)


def spread_table(table: Tensor, height: int, width: int) -> Tensor:
    """(R, H) -> (H, N, N)."""
    num_patches = height * width
    strip = table.t().contiguous().index_select(1, _strip_index(height, width))
    bias = table.new_empty(table.shape[1], num_patches + 1, num_patches + 1)
    torch._foreach_copy_(_query_rows(bias, height, width), _windows(strip, height, width))
    bias[:, 0].copy_(strip[:, -2 * num_patches - 1 : -num_patches])
    bias[:, 1:, 0].copy_(strip[:, -num_patches:])
    return bias


def fold_bias(grad_bias: Tensor, height: int, width: int) -> Tensor:
    """(H, N, N) -> (R, H), summed in a fixed order in at least fp32."""
    num_heads, num_patches = grad_bias.shape[0], height * width
    grad = grad_bias.contiguous().to(torch.promote_types(grad_bias.dtype, torch.float32))
    index = _strip_index(height, width)
    strip = grad.new_zeros(num_heads, len(index))
    # one query row after the other: on a CPU a _foreach_ is a plain loop, so that the windows may overlap
    torch._foreach_add_(_windows(strip, height, width), _query_rows(grad, height, width))
    strip[:, -2 * num_patches - 1 : -num_patches].copy_(grad[:, 0])
    strip[:, -num_patches:].copy_(grad[:, 1:, 0])
    folded = grad.new_zeros(num_heads, table_rows((height, width))).index_add_(1, index, strip)
    return folded.t().contiguous().to(grad_bias.dtype)
