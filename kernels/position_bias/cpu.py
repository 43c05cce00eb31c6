"""The relative position bias on CPU without an index: every step moves whole runs of memory.

A bias of shape (h, w, h, w) over (query row, query column, key row, key column) depends on the differences only. Rows
are handled first: the keys of one query row are a window of h out of the 2h - 1 row differences, so one slice copy (or,
in the gradient, one slice sum) serves a whole query row. Columns follow on an array h times smaller.
"""

from __future__ import annotations

import torch


def spread_table(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(R, H) -> (H, N, N)."""
    num_heads = table.shape[1]
    num_tokens = height * width + 1
    num_pairs = (2 * height - 1) * (2 * width - 1)
    # Differences run downwards along the keys: reverse them once, on the small table.
    differences = table[:num_pairs].flip(0).t().contiguous().view(num_heads, 2 * height - 1, 2 * width - 1)
    columns = differences.unfold(2, width, 1)  # (H, 2h-1, w, w): window start, key column
    strip = columns.flip(2).transpose(1, 2).contiguous()  # (H, query column, 2h-1, key column)
    bias = table.new_empty(num_heads, num_tokens, num_tokens)
    patches = bias[:, 1:, 1:]
    for row in range(height):
        window = strip[:, :, height - 1 - row : 2 * height - 1 - row]  # (H, w, h, w)
        patches[:, row * width : (row + 1) * width].copy_(window.flatten(2))
    bias[:, 0, 1:] = table[num_pairs][:, None]
    bias[:, 1:, 0] = table[num_pairs + 1][:, None]
    bias[:, 0, 0] = table[num_pairs + 2]
    return bias


def fold_bias(grad_bias: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(H, N, N) -> (R, H), summed in at least fp32."""
    num_heads = grad_bias.shape[0]
    num_pairs = (2 * height - 1) * (2 * width - 1)
    grad = grad_bias if grad_bias.dtype == torch.float64 else grad_bias.float()
    patches = grad[:, 1:, 1:]
    strip = grad.new_zeros(num_heads, width, (2 * height - 1), width)
    for row in range(height):
        window = strip[:, :, height - 1 - row : 2 * height - 1 - row]
        window.add_(patches[:, row * width : (row + 1) * width].unflatten(2, (height, width)))
    differences = grad.new_zeros(num_heads, 2 * height - 1, 2 * width - 1)
    for column in range(width):
        differences[:, :, width - 1 - column : 2 * width - 1 - column].add_(strip[:, column])
    folded = grad.new_empty(num_pairs + 3, num_heads)
    folded[:num_pairs] = differences.flatten(1).t().flip(0)
    folded[num_pairs] = grad[:, 0, 1:].sum(1)
    folded[num_pairs + 1] = grad[:, 1:, 0].sum(1)
    folded[num_pairs + 2] = grad[:, 0, 0]
    return folded.to(grad_bias.dtype)
