"""One transformer block: as the paper writes it, and with each residual sum and the LayerNorm after it as one op."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from beit_fast.kernels import Bias, bias_gelu, linear, residual_add, residual_layer_norm
from beit_fast.nn.attention import Attention
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
        self, x: Tensor, normed: Tensor, bias: Bias, drop_path: Tensor | None, next_norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The block between its neighbours: takes its norm1 ready made and returns the norm that is read next.

        Args:
            x, normed: (B, N, D), residual stream and `norm1` of it.
            bias, drop_path: as of `forward`, the bias ready made.
            next_norm: the LayerNorm that reads this block's output next; None if there is none.

        Returns:
            (B, N, D), residual stream, and `next_norm` of it or None.
        """
        return self.forward_after_attention(x, self.attn.attend(normed, bias), drop_path, next_norm)

    def forward_after_attention(
        self, x: Tensor, heads: Tensor, drop_path: Tensor | None, next_norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The part of `forward_fused` after attention; it works on any subset of the tokens.

        The biases of `proj`, `fc1` and `fc2` are added by the op that follows each product.

        Args:
            x, heads: (B, N, D), residual stream and `attn.attend`.
            drop_path, next_norm: as of `forward_fused`; so is what is returned.
        """
        proj, fc1, fc2, norm = self.attn.proj, self.mlp.fc1, self.mlp.fc2, self.norm2
        first, second = (None, None) if drop_path is None else drop_path
        x, normed = residual_layer_norm(
            x, linear(heads, proj.weight), self.gamma_1, first, norm.weight, norm.bias, norm.eps, proj.bias
        )
        branch = linear(bias_gelu(linear(normed, fc1.weight), fc1.bias, may_overwrite=True), fc2.weight)
        if next_norm is None:
            return residual_add(x, branch, self.gamma_2, second, fc2.bias), None
        return residual_layer_norm(
            x, branch, self.gamma_2, second, next_norm.weight, next_norm.bias, next_norm.eps, fc2.bias
        )
