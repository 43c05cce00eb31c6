"""The definition of the relative position bias (arXiv 2106.08254; the table layout of the released weights)."""

from __future__ import annotations

import torch


def relative_position_index(window_size: tuple[int, int]) -> torch.Tensor:
    """The row of the table that each pair (query, key) reads: int64 (N, N) with N = h * w + 1, token 0 being CLS.

    Patch tokens in row-major order read `(r_q - r_k + h - 1) * (2w - 1) + (c_q - c_k + w - 1)`. The last three rows
    of the table, R = (2h - 1)(2w - 1) + 3, are CLS to patch, patch to CLS, and CLS to CLS.
    """
    height, width = window_size
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    row_difference = rows[:, None] - rows[None, :] + height - 1
    column_difference = columns[:, None] - columns[None, :] + width - 1
    num_rows = table_rows(window_size)
    index = torch.empty(height * width + 1, height * width + 1, dtype=torch.int64)
    index[1:, 1:] = row_difference * (2 * width - 1) + column_difference
    index[0, :] = num_rows - 3
    index[:, 0] = num_rows - 2
    index[0, 0] = num_rows - 1
    return index


def table_rows(window_size: tuple[int, int]) -> int:
    """Rows of the table of a window: (2h - 1)(2w - 1) + 3."""
    height, width = window_size
    return (2 * height - 1) * (2 * width - 1) + 3


def relative_position_bias(table: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """`table[relative_position_index]` as (H, N, N)."""
    index = relative_position_index(window_size).to(table.device)
    return table[index].permute(2, 0, 1).contiguous()  # (N, N, H) -> (H, N, N)
