"""The learned bias on attention logits that depends on the offset between two patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit_fast.kernels import relative_position_bias


def table_parameter(window_size: tuple[int, int], num_heads: int) -> nn.Parameter:
    """A table of zeros, ((2h-1)(2w-1) + 3, H): a row per offset, then CLS to patch, patch to CLS and CLS to CLS."""
    height, width = window_size
    return nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1) + 3, num_heads))


class RelativePositionBias(nn.Module):
    """The table that all blocks share in pre-training (paper appendix A); in fine-tuning each block has its own."""

    def __init__(self, window_size: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.window_size = window_size
        self.relative_position_bias_table = table_parameter(window_size, num_heads)

    def forward(self) -> Tensor:
        """(H, N, N) with N = h*w + 1."""
        return relative_position_bias(self.relative_position_bias_table, self.window_size)
