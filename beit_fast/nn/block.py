"""One transformer block: as the paper writes it, and with each residual sum and the LayerNorm after it as one op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from beit_fast.kernels import Bias, bias_gelu, linear, residual_add, residual_layer_norm
from beit_fast.kernels.half_linear import cast_into, half_dtype, half_linear
from beit_fast.nn.attention import Attention, HalfWeights
from beit_fast.nn.drop_path import kept_samples
from beit_fast.nn.mlp import Mlp
from beit_fast.nn.stock import all_stock

torch.fx.wrap("residual_add")


class Block(nn.Module):
    """x = x + gamma_1 * attn(norm1(x)); x = x + gamma_2 * mlp(norm2(x)), each with drop path (paper section 2.3).

    Args:
        width, num_heads, mlp_ratio: D, H, hidden width of the MLP over D.
        eps: of both LayerNorms.
        layer_scale_init: start value of gamma_1 and gamma_2; None or 0 leaves them out (preset `plain`).
        window_size: patch grid of the block's own relative position table; None where it has none.
        qkv_bias, attn_drop, proj_drop: as of `Attention`; `proj_drop` is also that of the MLP.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        eps: float,
        layer_scale_init: float | None,
        window_size: tuple[int, int] | None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads, window_size, qkv_bias, attn_drop, proj_drop)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), proj_drop)
        self.gamma_1: nn.Parameter | None = None
        self.gamma_2: nn.Parameter | None = None
        if layer_scale_init:
            self.gamma_1 = nn.Parameter(torch.full((width,), float(layer_scale_init)))
            self.gamma_2 = nn.Parameter(torch.full((width,), float(layer_scale_init)))

    def forward(self, x: Tensor, bias: Bias | partial[Bias] = None, drop_path: Tensor | None = None) -> Tensor:
        """The block by itself, (B, N, D) -> (B, N, D).

        Args:
            bias: (H, N, N), prepared or plain; a `partial` that makes it; or None.
            drop_path: (2, B) factors of the two branches, or None.
        """
        if isinstance(bias, partial):
            bias = bias()
        if not isinstance(x, torch.fx.Proxy) and self.can_fuse(called=True):
            return self.forward_fused(x, self.norm1(x), bias, drop_path)[0]
        first, second = (None, None) if drop_path is None else drop_path
        x = residual_add(x, self.attn(self.norm1(x), bias), self.gamma_1, first)
        return residual_add(x, self.mlp(self.norm2(x)), self.gamma_2, second)

    def can_fuse(self, called: bool = False) -> bool:
        """Whether `forward_fused` does what calling the block (or, in a block that is `called`, its parts) would do."""
        attn, mlp, norm1, norm2 = self.attn, self.mlp, self.norm1, self.norm2
        if self.training and (attn.attn_drop.p or attn.proj_drop.p or mlp.drop1.p or mlp.drop2.p):
            return False
        return (called or all_stock((self, Block))) and all_stock(
            (norm1, nn.LayerNorm), (attn, Attention), (attn.qkv, nn.Linear), (attn.attn_drop, nn.Dropout),
            (attn.proj, nn.Linear), (attn.proj_drop, nn.Dropout), (norm2, nn.LayerNorm), (mlp, Mlp),
            (mlp.fc1, nn.Linear), (mlp.drop1, nn.Dropout), (mlp.fc2, nn.Linear), (mlp.drop2, nn.Dropout),
        ) and norm1.bias is not None and norm2.bias is not None  # fmt: skip

    def forward_fused(
        self, x: Tensor, normed: Tensor, bias: Bias, drop_path: Tensor | None, next_norm: nn.LayerNorm | None = None,
        half: HalfWeights | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The block between its neighbours: takes its norm1 ready made and returns the norm that is read next.

        Args:
            x, normed: (B, N, D), residual stream and `norm1` of it.
            bias, drop_path: as of `forward`, the bias ready made.
            next_norm: the LayerNorm that reads this block's output next; None if there is none.
            half: this block's part of `cast_weights`.

        Returns:
            (B, N, D), residual stream, and `next_norm` of it or None.
        """
        kept = None if drop_path is None else kept_samples(drop_path[0], x)
        if kept is not None:
            normed = normed.index_select(0, kept)
        heads = self.attn.attend(normed, bias, half)
        return self.forward_after_attention(x, heads, drop_path, next_norm, half, kept)

    def forward_after_attention(
        self, x: Tensor, heads: Tensor, drop_path: Tensor | None, next_norm: nn.LayerNorm | None = None,
        half: HalfWeights | None = None, kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The part of `forward_fused` after attention; it works on any subset of the tokens.

        The biases of `proj`, `fc1` and `fc2` are added by the op that follows each product.

        Args:
            x, heads: (B, N, D), residual stream and `attn.attend`.
            drop_path, next_norm, half: as of `forward_fused`; so is what is returned.
            kept: the samples of which `heads` are, where these are not all (`kept_samples`).
        """
        proj, fc1, fc2, norm = self.attn.proj, self.mlp.fc1, self.mlp.fc2, self.norm2
        first, second = (None, None) if drop_path is None else drop_path
        branch = linear(heads, proj.weight) if half is None else half_linear(heads, proj.weight, half.proj)
        x, normed = residual_layer_norm(
            x, branch, self.gamma_1, first, norm.weight, norm.bias, norm.eps, proj.bias, kept
        )  # fmt: skip
        kept = None if second is None else kept_samples(second, x)
        if kept is not None:
            normed = normed.index_select(0, kept)
        hidden = linear(normed, fc1.weight) if half is None else half_linear(normed, fc1.weight, half.fc1)
        hidden = bias_gelu(hidden, fc1.bias, may_overwrite=True)
        branch = linear(hidden, fc2.weight) if half is None else half_linear(hidden, fc2.weight, half.fc2)
        if next_norm is None:
            return residual_add(x, branch, self.gamma_2, second, fc2.bias, kept), None
        return residual_layer_norm(
            x, branch, self.gamma_2, second, next_norm.weight, next_norm.bias, next_norm.eps, fc2.bias, kept
        )


def cast_weights(blocks: Sequence[Block], x: Tensor) -> list[HalfWeights | None]:
    """The weights of these blocks in autocast's dtype, all cast in one call; None for each where that is no gain."""
    weights: list[Tensor] = []
    for block in blocks:
        weights += [layer.weight for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)]
    pairs = {i: (block.attn.q_bias, block.attn.v_bias) for i, block in enumerate(blocks)}
    biases = {
        (i, 2 * j): b
        for i, pair in pairs.items()
        if all(b is not None for b in pair)
        for j, b in enumerate(pair)
        if b is not None
    }
    weights += biases.values()
    dtype = half_dtype(x, weights)
    if dtype is None:
        return [None] * len(blocks)
    copies = [torch.empty_like(weight, dtype=dtype) for weight in weights[: 4 * len(blocks)]]
    rows = x.new_zeros(len(blocks), 3, weights[0].shape[1], dtype=dtype)
    cast_into(copies + [rows[place] for place in biases], weights)
    halves: list[HalfWeights | None] = []
    for i in range(len(blocks)):
        qkv, proj, fc1, fc2 = copies[4 * i : 4 * i + 4]
        halves.append(HalfWeights(qkv, proj, fc1, fc2, rows[i].flatten() if (i, 0) in biases else None))
    return halves
