"""The relative position bias on CPU by moving whole runs of memory.

A bias over (query row, query column, key row, key column) depends on two differences only. In a strip laid out as
(query column, key row - query row, key column) the keys of one query row are a contiguous window of h * w elements: one
slice copy, or in the gradient one slice sum, serves a whole query row. What an index has left to do is h times smaller
than the bias. Of a small bias all pairs are indexed in one call: what it costs to make many weighs more there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from beit_fast.kernels.position_bias.reference import relative_position_index, table_rows
from beit_fast.kernels.registration import constant

FEW_PATCHES = 256
"""Up to here `index_pairs` is faster: at most 0.7 of the time at 14 x 14 patches, but twice the time at 24 x 24."""


@constant
def _pair_index(height: int, width: int) -> Tensor:
    """The table row of each (query, key); int64, flat."""
    return relative_position_index((height, width)).flatten()


def index_pairs(table: Tensor, height: int, width: int) -> Tensor:
    """(R, H) -> (H, N, N) by torch's indexing, heads first, and its gradient: in a fixed order, in fp32 at least."""
    if table.element_size() < 4:
        return index_pairs(table.float(), height, width).to(table.dtype)
    num_tokens = height * width + 1
    index = _pair_index(height, width).expand(table.shape[1], -1)
    pairs = table.t().contiguous().gather(1, index)  # three quarters of the time of index_select
    return pairs.view(-1, num_tokens, num_tokens)


@constant
def _strip_index(height: int, width: int) -> Tensor:
    """The table row behind each element of the strip, and then of the row and of the column of CLS; int64, flat."""
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


def gather_bias(table: Tensor, height: int, width: int) -> Tensor:
    """(R, H) -> (H, N, N)."""
    num_heads, num_patches = table.shape[1], height * width
    strip = table.t().contiguous().index_select(1, _strip_index(height, width))
    bias = table.new_empty(num_heads, num_patches + 1, num_patches + 1)
    torch._foreach_copy_(_query_rows(bias, height, width), _windows(strip, height, width))
    bias[:, 0].copy_(strip[:, -2 * num_patches - 1 : -num_patches])
    bias[:, 1:, 0].copy_(strip[:, -num_patches:])
    return bias


def scatter_table_grad(grad_bias: Tensor, height: int, width: int) -> Tensor:
    """(H, N, N) -> (R, H), summed in a fixed order in at least fp32."""
    num_heads, num_tokens, num_patches = grad_bias.shape[0], grad_bias.shape[1], height * width
    grad = grad_bias.contiguous()
    if grad.element_size() < 4:
        grad = grad.float()
    grad_table = grad.new_zeros(num_heads, table_rows((height, width)))
    index = _strip_index(height, width)
    strip = grad.new_zeros(num_heads, len(index))
    from_cls = len(index) - num_tokens - num_patches
    sums = (
        *_windows(strip, height, width),
        strip.as_strided((num_heads, num_tokens), strip.stride(), from_cls),
        strip.as_strided((num_heads, num_patches), strip.stride(), from_cls + num_tokens),
    )
    parts = (
        *_query_rows(grad, height, width),
        grad.as_strided((num_heads, num_tokens), (num_tokens**2, 1), grad.storage_offset()),
        grad.as_strided((num_heads, num_patches), (num_tokens**2, num_tokens), grad.storage_offset() + num_tokens),
    )
    # one part after the other: on a CPU a _foreach_ is a plain loop, so that the windows may overlap
    torch._foreach_add_(sums, parts)
    return grad_table.index_add_(1, index, strip).t().contiguous().to(grad_bias.dtype)
