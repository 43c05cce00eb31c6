"""timm's BEiT on the kernels of this library, and this library's BEiT under timm's `create_model`."""

from __future__ import annotations

from typing import Any

import timm.models.beit as theirs
import torch
from timm.layers import DropPath, LayerNorm, Mlp
from timm.models import register_model
from torch import Tensor, nn

import beit_fast
from beit_fast import kernels
from beit_fast.integrations.blocks import bias_for_all, drop_factors, inactive, prepared
from beit_fast.kernels import Bias
from beit_fast.nn.stock import is_stock, linear_without_bias


class Block(theirs.Block):
    """timm's block, its residual sums fused with the LayerNorm that follows, its attention ours."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), with the bias (H, N, N) that all blocks share."""
        if not self._as_made():
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
        attn, mlp, norm = self.attn, self.mlp, self.norm2
        normed = self.norm1(x)
        qkv = kernels.linear(normed, attn.qkv.weight, self._qkv_bias())
        mixed = kernels.packed_attention(
            qkv.view(*x.shape[:2], 3, attn.num_heads, -1), self._bias(shared_rel_pos_bias, qkv.dtype), attn.scale
        )
        branch, bias = linear_without_bias(attn.proj, mixed.flatten(2))
        x, normed = kernels.residual_layer_norm(
            x, branch, self.gamma_1, drop_factors(self.drop_path1, x), norm.weight, norm.bias, norm.eps, bias
        )
        hidden, bias = linear_without_bias(mlp.fc1, normed)
        branch, last_bias = linear_without_bias(
            mlp.fc2, kernels.bias_gelu(hidden, bias, may_overwrite=bias is not None)
        )
        return kernels.residual_add(x, branch, self.gamma_2, drop_factors(self.drop_path2, x), last_bias)

    def _as_made(self) -> bool:
        """Whether nothing has been put into or onto the block that its own `forward` would heed and this one not."""
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

    def _qkv_bias(self) -> Tensor | None:
        attn = self.attn
        return None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))

    def _bias(self, shared: Tensor | None, dtype: torch.dtype) -> Bias:
        table = self.attn.relative_position_bias_table
        if table is None:
            return None if shared is None else prepared(shared, dtype)
        own = kernels.relative_position_bias(table, self.attn.window_size)
        return kernels.prepare_bias(own if shared is None else own + shared, dtype)


class RelativePositionBias(theirs.RelativePositionBias):
    """timm's table for all blocks, spread by our kernel."""

    def forward(self) -> Tensor:
        """(H, N, N)."""
        bias = kernels.relative_position_bias(self.relative_position_bias_table, self.window_size)
        return bias_for_all(bias, bias.view(bias.shape))


FASTER: dict[type[nn.Module], type[nn.Module]] = {
    theirs.Block: Block,
    theirs.RelativePositionBias: RelativePositionBias,
}


def find(model: nn.Module) -> list[nn.Module]:
    """The modules of timm's BEiTs within `model` that have a faster class.

    Raises:
        ValueError: a BEiT is of a kind that we do not have.
    """
    found = []
    for name, module in model.named_modules():
        if type(module) is theirs.Block:
            _check(module, name)
        if type(module) in FASTER:
            found.append(module)
    return found


def _check(block: Any, name: str) -> None:
    problems = {
        "its MLP is a SwiGLU": not isinstance(block.mlp, Mlp),
        "its MLP has a norm": not isinstance(getattr(block.mlp, "norm", None), nn.Identity),
        "its activation is not the exact GELU": not _exact_gelu(getattr(block.mlp, "act", None)),
        "its norms are not LayerNorms with weight and bias": not all(_affine(n) for n in (block.norm1, block.norm2)),
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(f"timm's BEiT block {name!r} is not supported: {problem}")


def _exact_gelu(activation: nn.Module | None) -> bool:
    return type(activation) is nn.GELU and activation.approximate == "none"


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
    for name in beit_fast.list_models():
        alias = (
            name.replace("beitv2", "beit_fastv2") if name.startswith("beitv2") else name.replace("beit", "beit_fast")
        )
        register_model(_factory(alias, name))
        names.append(alias)
    return names


def _factory(alias: str, name: str) -> Any:
    def create(pretrained: bool = False, **kwargs: Any) -> beit_fast.Beit:
        return beit_fast.create_model(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = alias
    create.__module__ = __name__
    return create


default_cfgs: dict[str, Any] = {}  # where timm's registry looks for descriptions; the models bring their own
