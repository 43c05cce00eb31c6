"""One transformer block, written so that every residual sum and the LayerNorm after it are one op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from beit_fast import kernels
from beit_fast.kernels import Bias
from beit_fast.nn.attention import Attention
from beit_fast.nn.mlp import Mlp
from beit_fast.nn.stock import is_stock, linear_without_bias


class Block(nn.Module):
    """x + gamma_1 * attention(norm1(x)), then x + gamma_2 * mlp(norm2(x)), each with drop path (paper section 2.3).

    Args:
        width, num_heads, mlp_ratio: D, H, hidden width of the MLP over D.
        eps: of both LayerNorms.
        layer_scale_init: start value of gamma_1 and gamma_2; None or 0 leaves them out (preset `plain`).
        window_size: patch grid of the block's own relative position table; None where it has none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        eps: float,
        layer_scale_init: float | None,
        window_size: tuple[int, int] | None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, num_heads, window_size)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        if layer_scale_init:
            self.gamma_1 = nn.Parameter(torch.full((width,), float(layer_scale_init)))
            self.gamma_2 = nn.Parameter(torch.full((width,), float(layer_scale_init)))
        else:
            self.register_parameter("gamma_1", None)
            self.register_parameter("gamma_2", None)

    def forward(self, x: Tensor, bias: Bias | Callable[[], Bias] = None, drop_path: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); `bias` (H, N, N) prepared, plain, None, or what makes it; `drop_path` (2, B)."""
        if callable(bias):
            bias = bias()
        if self._parts_are_stock():
            return self.chain(x, self.norm1(x), bias, drop_path, None)[0]
        first, second = (None, None) if drop_path is None else drop_path
        x = kernels.residual_add(x, self.attn(self.norm1(x), bias), self.gamma_1, first)
        return kernels.residual_add(x, self.mlp(self.norm2(x)), self.gamma_2, second)

    def can_fuse(self) -> bool:
        """Whether `chain` and `finish` do what calling the block does: nobody watches or replaced it or its parts.

        Its linear layers may be touched: they are then called.
        """
        return is_stock(self, Block) and self._parts_are_stock()

    def _parts_are_stock(self) -> bool:
        return (
            is_stock(self.attn, Attention)
            and is_stock(self.mlp, Mlp)
            and is_stock(self.norm1, nn.LayerNorm)
            and is_stock(self.norm2, nn.LayerNorm)
        )

    def chain(
        self, x: Tensor, normed: Tensor, bias: Bias, drop_path: Tensor | None, next_norm: nn.LayerNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        """The block between its neighbours: takes norm1(x) ready made, gives `next_norm` of its output along with it.

        Args:
            x, normed: (B, N, D) residual stream and its norm1.
            next_norm: the LayerNorm that reads this block's output next; None if there is none.

        Returns:
            (B, N, D) residual stream, and its `next_norm` or None.
        """
        x, normed = self._add_attention(x, self.attn.mix(normed, bias), drop_path)
        return self._add_mlp(x, normed, drop_path, next_norm)

    def finish(self, x: Tensor, mixed: Tensor, drop_path: Tensor | None) -> Tensor:
        """All of the block behind the mixing of tokens, which works on any subset of them.

        Args:
            x, mixed: (B, N, D) residual stream and `attn.mix` of its norm1; any tokens, as long as both are the same.
            drop_path: (2, B) factors or None.
        """
        x, normed = self._add_attention(x, mixed, drop_path)
        return self._add_mlp(x, normed, drop_path, None)[0]

    def _add_attention(self, x: Tensor, mixed: Tensor, drop_path: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual sum behind the attention and its norm2."""
        proj, norm = self.attn.proj, self.norm2
        factors = None if drop_path is None else drop_path[0]
        branch, bias = linear_without_bias(proj, mixed)
        return kernels.residual_layer_norm(x, branch, self.gamma_1, factors, norm.weight, norm.bias, norm.eps, bias)

    def _add_mlp(
        self, x: Tensor, normed: Tensor, drop_path: Tensor | None, next_norm: nn.LayerNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual sum behind the MLP and its `next_norm`."""
        branch, bias = self.mlp.branch(normed)
        factors = None if drop_path is None else drop_path[1]
        if next_norm is None:
            return kernels.residual_add(x, branch, self.gamma_2, factors, bias), None
        return kernels.residual_layer_norm(
            x, branch, self.gamma_2, factors, next_norm.weight, next_norm.bias, next_norm.eps, bias
        )
