"""What the faster blocks of timm and of transformers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beit_fast.kernels import Bias, bias_gelu, linear, prepare_bias, residual_add, residual_layer_norm
from beit_fast.nn.stock import is_stock


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer gives, by the fastest product where it is stock."""
    if is_stock(module, nn.Linear):
        return linear(x, module.weight, module.bias)  # type: ignore[arg-type]
    result: Tensor = module(x)
    return result


def linear_without_bias(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a linear layer gives, and the bias that it has not added yet (None where it had to be called)."""
    if is_stock(module, nn.Linear):
        return linear(x, module.weight), module.bias  # type: ignore[arg-type, return-value]
    return module(x), None


def forward_after_attention(
    x: Tensor,
    heads: Tensor,
    modules: tuple[nn.Module, nn.LayerNorm, nn.Module, nn.Module],
    gammas: tuple[Tensor | None, Tensor | None],
    factors: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """All of a block after its tokens have met; it works on any subset of them.

    Args:
        x, heads: (B, N, D), residual stream and the heads' outputs side by side.
        modules: the projection, the LayerNorm before the MLP, and the MLP's two linear layers.
        gammas, factors: LayerScale (D,) and drop path (B,) of both branches, each or None.
    """
    proj, norm, fc1, fc2 = modules
    branch, bias = linear_without_bias(proj, heads)
    x, normed = residual_layer_norm(x, branch, gammas[0], factors[0], norm.weight, norm.bias, norm.eps, bias)
    hidden, bias = linear_without_bias(fc1, normed)
    # a bias that is still to be added means that `hidden` was made here and is ours
    branch, bias = linear_without_bias(fc2, bias_gelu(hidden, bias, may_overwrite=bias is not None))
    return residual_add(x, branch, gammas[1], factors[1], bias)


def inactive(dropout: nn.Module) -> bool:
    """Whether a dropout passes its input through, without hooks that expect it to be called."""
    active = type(dropout) is nn.Dropout and dropout.p and dropout.training
    return not active and is_stock(dropout, nn.Dropout, nn.Identity)


def drop_factors(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """(B,) factors of the samples, drawn by the block's own drop path, whose random numbers thus stay the same."""
    if type(drop_path) is nn.Identity or not drop_path.training:
        return None
    return drop_path(x.new_ones(x.shape[0], *(1,) * (x.dim() - 1))).flatten()


def bias_for_all(bias: Tensor, view: Tensor) -> Tensor:
    """`view`, a view of the bias (H, N, N) that the model passes to all its blocks, with the prepared bias attached.

    As an attribute: their code between here and the blocks passes one tensor, and both must be freed together.
    """
    if not torch.compiler.is_compiling():
        device = bias.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else bias.dtype
        # on a view, not on the bias itself: the prepared one refers to the bias, and such a circle would never be freed
        view._beit_fast_prepared = dtype, prepare_bias(bias, dtype)  # type: ignore[attr-defined]
    return view


def prepared(bias: Tensor, dtype: torch.dtype) -> Bias:
    """A bias (H, N, N) or (1, H, N, N) as the attention of that dtype takes it."""
    known_dtype, known = getattr(bias, "_beit_fast_prepared", (None, None))
    if known_dtype == dtype:
        return known
    return prepare_bias(bias[0] if bias.dim() == 4 else bias, dtype)


def exact_gelu(activation: nn.Module | None) -> bool:
    """Whether it is torch's own module of the erf form."""
    return type(activation) is nn.GELU and activation.approximate == "none"
