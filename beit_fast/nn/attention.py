"""Multi-head self-attention with a learned bias on the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from beit_fast.kernels import Bias, linear, packed_attention
from beit_fast.kernels.attention.op import PreparedBias
from beit_fast.kernels.half_linear import half_linear
from beit_fast.nn.relative_position_bias import table_parameter
from beit_fast.nn.stock import all_stock


class HalfWeights(NamedTuple):
    """What the matrix products of a block read under autocast, cast beforehand; `qkv_bias` (3D,) is 0 for k."""

    qkv: Tensor
    proj: Tensor
    fc1: Tensor
    fc2: Tensor
    qkv_bias: Tensor | None


class Attention(nn.Module):
    """softmax(q k^T / sqrt(K) + bias) v (paper section 2.3), one weight for q, k and v.

    The bias of k is left out: it would add the same constant to a whole row of logits, which softmax ignores.

    Args:
        width: D.
        num_heads: H; D must be a multiple of it.
        window_size: patch grid of this block's own relative position table; None where it has none.
        qkv_bias: whether q and v have biases.
        attn_drop, proj_drop: dropout of the probabilities and of the output (BEiT uses none).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        window_size: tuple[int, int] | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        # The official keys put a block's own table on the attention module itself.
        self.relative_position_bias_table = None if window_size is None else table_parameter(window_size, num_heads)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, bias: Bias = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `bias` is (H, N, N), prepared or plain, or None."""
        qkv, qkv_bias, drop = self.qkv(x), self.qkv_bias(), self.attn_drop
        if qkv_bias is not None:
            qkv = qkv + qkv_bias.to(qkv.dtype)
        plain = isinstance(x, torch.fx.Proxy) or not all_stock((drop, nn.Dropout)) or (drop.training and drop.p)
        heads = self._heads_with_probabilities(qkv, bias) if plain else self._heads(qkv, bias)
        return self.proj_drop(self.proj(heads))

    def _heads_with_probabilities(self, qkv: Tensor, bias: Bias) -> Tensor:
        """As `_heads`, with the probabilities (B, H, N, N) passed through `attn_drop` for its hooks and its dropout."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, K)
        logits = q @ k.transpose(-2, -1) * self.scale
        if bias is not None:
            logits = logits + (bias.bias if isinstance(bias, PreparedBias) else bias)
        probabilities = self.attn_drop(logits.softmax(dim=-1).to(v.dtype))
        return (probabilities @ v).transpose(1, 2).flatten(2)

    def attend(self, x: Tensor, bias: Bias, half: HalfWeights | None = None) -> Tensor:
        """(B, N, D) -> the heads' outputs side by side (B, N, D), before `proj`; `qkv` must be stock."""
        if half is None:
            return self._heads(linear(x, self.qkv.weight, self.qkv_bias()), bias)
        return self._heads(half_linear(x, self.qkv.weight, half.qkv, half.qkv_bias, self.q_bias, self.v_bias), bias)

    def _heads(self, qkv: Tensor, bias: Bias) -> Tensor:
        batch, tokens, triple = qkv.shape
        qkv = qkv.view(batch, tokens, 3, self.num_heads, triple // (3 * self.num_heads))  # no -1: batch may be 0
        return packed_attention(qkv, bias, self.scale).reshape(batch, tokens, triple // 3)

    def qkv_bias(self) -> Tensor | None:
        """(3D,), zeros for k; None where there is none."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
