"""Multi-head self-attention with a learned bias on the logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit_fast import kernels
from beit_fast.kernels import Bias
from beit_fast.nn.relative_position_bias import table_parameter
from beit_fast.nn.stock import is_stock


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
        return self.proj(self.mix(x, bias))

    def mix(self, x: Tensor, bias: Bias) -> Tensor:
        """(B, N, D) -> (B, N, D): the heads' outputs side by side, before `proj`."""
        batch, tokens, width = x.shape
        bias_of_qkv = self.qkv_bias()
        if is_stock(self.qkv, nn.Linear):
            qkv = kernels.linear(x, self.qkv.weight, bias_of_qkv)
        else:
            qkv = self.qkv(x)
            qkv = qkv + bias_of_qkv.to(qkv.dtype)
        qkv = qkv.view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        return kernels.packed_attention(qkv, bias, self.scale).reshape(batch, tokens, width)

    def qkv_bias(self) -> Tensor:
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
