"""Multi-head self-attention with a learned bias on the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit_fast.kernels import Bias, linear, packed_attention
from beit_fast.nn.relative_position_bias import table_parameter


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K) + bias) v (paper section 2.3), one weight for q, k and v.

    The bias of k is left out: it would add the same constant to a whole row of logits, which softmax ignores.

    Args:
        width: D.
        num_heads: H; D must be a multiple of it.
        window_size: patch grid of this block's own relative position table; None where it has none.
    """

    def __init__(self, width: int, num_heads: int, window_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        # The official keys put a block's own table on the attention module itself.
        self.relative_position_bias_table = None if window_size is None else table_parameter(window_size, num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Bias = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `bias` is (H, N, N), prepared or plain, or None."""
        qkv = self.qkv(x)
        return self.proj(self._heads(qkv + self.qkv_bias().to(qkv.dtype), bias))

    def attend(self, x: Tensor, bias: Bias) -> Tensor:
        """(B, N, D) -> the heads' outputs side by side (B, N, D), before `proj`; `qkv` must be stock."""
        return self._heads(linear(x, self.qkv.weight, self.qkv_bias()), bias)

    def _heads(self, qkv: Tensor, bias: Bias) -> Tensor:
        batch, tokens, _ = qkv.shape
        qkv = qkv.view(batch, tokens, 3, self.num_heads, -1)
        return packed_attention(qkv, bias, self.scale).reshape(batch, tokens, -1)

    def qkv_bias(self) -> Tensor:
        """(3D,), zeros for k."""
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
