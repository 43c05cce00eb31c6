"""timm's BEiT on the kernels of this library, and this library's BEiT under timm's `create_model`."""

from __future__ import annotations

from typing import Any

import timm.models.beit as theirs
import torch
from timm.layers import DropPath, LayerNorm, Mlp
from timm.models import register_model
from torch import Tensor, nn

from beit_fast.integrations.blocks import (
    bias_for_all,
    drop_factors,
    exact_gelu,
    forward_after_attention,
    inactive,
    prepared,
)
from beit_fast.kernels import Bias, linear, packed_attention, prepare_bias, relative_position_bias
from beit_fast.models import Beit, create_model, list_models
from beit_fast.nn.stock import is_stock


class Block(theirs.Block):
    """timm's block, its residual sums fused with the LayerNorm that follows, its attention ours."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), with the bias (H, N, N) that all blocks share."""
        if not self._is_as_made():
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
        attn, mlp, gammas = self.attn, self.mlp, (self.gamma_1, self.gamma_2)
        qkv_bias = None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        qkv = linear(self.norm1(x), attn.qkv.weight, qkv_bias).view(*x.shape[:2], 3, attn.num_heads, -1)
        heads = packed_attention(qkv, self._bias(shared_rel_pos_bias, qkv.dtype), attn.scale).flatten(2)
        factors = drop_factors(self.drop_path1, x), drop_factors(self.drop_path2, x)
        return forward_after_attention(x, heads, (attn.proj, self.norm2, mlp.fc1, mlp.fc2), gammas, factors)

    def _is_as_made(self) -> bool:
        """Whether the block is as it was made in everything that its own `forward` respects and this one does not."""
        attn, mlp = self.attn, self.mlp
        return (
            is_stock(attn, theirs.Attention)
            and is_stock(attn.qkv, nn.Linear)
            and is_stock(self.norm2, LayerNorm, nn.LayerNorm)
            and is_stock(mlp, Mlp)
            and is_stock(mlp.act, nn.GELU)
            and is_stock(mlp.norm, nn.Identity)
            and all(inactive(d) for d in (attn.attn_drop, attn.proj_drop, mlp.drop1, mlp.drop2))
            and is_stock(self.drop_path1, DropPath, nn.Identity)
            and is_stock(self.drop_path2, DropPath, nn.Identity)
        )

    def _bias(self, shared: Tensor | None, dtype: torch.dtype) -> Bias:
        table = self.attn.relative_position_bias_table
        if table is None:
            return None if shared is None else prepared(shared, dtype)
        own = relative_position_bias(table, self.attn.window_size)
        return prepare_bias(own if shared is None else own + shared, dtype)


class RelativePositionBias(theirs.RelativePositionBias):
    """timm's table for all blocks, gathered by our kernel."""

    def forward(self) -> Tensor:
        """(H, N, N)."""
        bias = relative_position_bias(self.relative_position_bias_table, self.window_size)
        return bias_for_all(bias, bias.view(bias.shape))


FASTER: dict[type[nn.Module], type[nn.Module]] = {
    theirs.Block: Block,
    theirs.RelativePositionBias: RelativePositionBias,
}


def check(model: nn.Module) -> None:
    """Raises ValueError where a timm BEiT within `model` is of a kind that has no faster class."""
    for name, block in model.named_modules():
        if type(block) is not theirs.Block:
            continue
        problems = {
            "its MLP is a SwiGLU": not isinstance(block.mlp, Mlp),
            "its MLP has a norm": not isinstance(getattr(block.mlp, "norm", None), nn.Identity),
            "its activation is not the exact GELU": not exact_gelu(getattr(block.mlp, "act", None)),
            "its norms are not LayerNorms with weight and bias": not (_affine(block.norm1) and _affine(block.norm2)),
        }
        for problem, applies in problems.items():
            if applies:
                raise ValueError(f"timm's BEiT block {name!r} is not supported: {problem}")


def _affine(norm: nn.Module) -> bool:
    return isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None


def register() -> list[str]:
    """Lets `timm.create_model("beit_fast_base_patch16_224")` and the like make models of this library.

    Call it once; importing this module does not do it. Names are those of `beit_fast.list_models()` with `beit_fast`
    for `beit`, and `beit_fastv2` for `beitv2`.

    Returns:
        The names.
    """
    names = []
    for name in list_models():
        alias = name.replace("beit", "beit_fast", 1)
        register_model(_factory(alias, name))
        names.append(alias)
    return names


def _factory(alias: str, name: str) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> Beit:
        return create_model(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = alias
    create.__module__ = __name__
    return create


default_cfgs: dict[str, Any] = {}  # where timm's registry looks for descriptions; the models bring their own
