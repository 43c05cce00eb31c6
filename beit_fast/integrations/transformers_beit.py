"""transformers' BEiT on the kernels of this library."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers.models.beit.modeling_beit as theirs
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from beit_fast.integrations.blocks import (
    apply_linear,
    bias_for_all,
    drop_factors,
    exact_gelu,
    forward_after_attention,
    inactive,
    prepared,
)
from beit_fast.integrations.later_logits import LaterLogits
from beit_fast.kernels import Bias, biased_attention, masked_cross_entropy, relative_position_bias
from beit_fast.nn.stock import all_stock, is_stock


@dataclass
class RowSubset:
    """Lets the last block compute only what the masked positions need; see `BeitLayer.forward`."""

    block: nn.Module
    rows: Tensor
    """(M,) int64, of the flattened (B * N, D)."""
    all_rows: Callable[[], Tensor] | None = None
    """Set by the block where it did so: computes its whole output, (B, N, D)."""


_SAME_RESULT = (None, "eager", "sdpa", "beit_fast")  # implementations of attention that compute what ours does


class BeitLayer(theirs.BeitLayer):
    """transformers' block, its residual sums fused with the LayerNorm that follows, its attention ours."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        resolution: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D); `attention_mask` is the bias (1, H, N, N) that all blocks share, or a mask.

        With `row_subset`, if it is for this block: (M, 1, D), all of the block after the attention, at these rows.
        """
        row_subset: RowSubset | None = kwargs.pop("row_subset", None)
        x, attention = hidden_states, self.attention
        if not self._is_as_made(kwargs) or (attention_mask is not None and not _is_bias(attention_mask, x, attention)):
            return super().forward(hidden_states, attention_mask, interpolate_pos_encoding, resolution, **kwargs)
        normed = self.layernorm_before(x)
        shape = (*x.shape[:2], attention.num_attention_heads, attention.head_dim)
        q, k, v = (apply_linear(p, normed).view(shape) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        bias = self._bias(attention_mask, x, resolution, q.dtype)
        heads = biased_attention(q, k, v, bias, attention.scaling).flatten(2)
        factors = drop_factors(self.drop_path, x), drop_factors(self.drop_path, x)
        gammas = _gamma(self.lambda_1), _gamma(self.lambda_2)
        modules = attention.o_proj, self.layernorm_after, self.mlp.fc1, self.mlp.fc2
        if row_subset is None or row_subset.block is not self:
            return forward_after_attention(x, heads, modules, gammas, factors)
        row_subset.all_rows = lambda: forward_after_attention(x, heads, modules, gammas, factors)
        rows = row_subset.rows
        sample = torch.div(rows, x.shape[1], rounding_mode="floor")
        some_x, some_heads = (t.flatten(0, 1).index_select(0, rows).unsqueeze(1) for t in (x, heads))
        first, second = (None if f is None else f.index_select(0, sample) for f in factors)
        return forward_after_attention(some_x, some_heads, modules, gammas, (first, second))

    def _is_as_made(self, kwargs: dict[str, Any]) -> bool:
        """Whether the block is as it was made in everything that its own `forward` respects and this one does not."""
        attention, config = self.attention, self.attention.config
        if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
            return False
        return (
            config._attn_implementation in _SAME_RESULT
            and (attention.attention_dropout == 0.0 or not attention.training)
            and _is_stock_to_transformers(attention, theirs.BeitAttention)
            and all_stock((self.mlp, theirs.BeitMLP), (self.layernorm_after, nn.LayerNorm))
            and _exact_gelu(self.mlp.activation_fn)
            and inactive(self.dropout)
            and is_stock(self.drop_path, theirs.BeitDropPath, nn.Identity)
        )

    def _bias(self, shared: Tensor | None, x: Tensor, resolution: tuple[int, int] | None, dtype: torch.dtype) -> Bias:
        if self.relative_position_bias is None:
            return None if shared is None else prepared(shared, dtype)
        assert resolution is not None
        window = (resolution[0] // self.patch_size, resolution[1] // self.patch_size)
        own = self.relative_position_bias(window, False, dim_size=x.shape[1])
        return prepared(own if shared is None else own + shared, dtype)


def _is_bias(mask: Tensor, x: Tensor, attention: Any) -> bool:
    """Whether what arrives as a mask is one additive (1, H, N, N) for all samples."""
    num_tokens = x.shape[1]
    return mask.is_floating_point() and mask.shape == (1, attention.num_attention_heads, num_tokens, num_tokens)


def _is_stock_to_transformers(module: nn.Module, kind: type[nn.Module]) -> bool:
    """As `is_stock`; transformers' own hooks, which collect hidden states and attentions on request, do not count."""
    hooks = module._forward_hooks.values()
    return all(getattr(hook, "__name__", "") == "output_capturing_hook" for hook in hooks) and not (
        type(module) is not kind or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _exact_gelu(activation: nn.Module) -> bool:
    return activation.act is F.gelu if type(activation) is GELUActivation else exact_gelu(activation)


def _gamma(scale: Tensor | float) -> Tensor | None:
    return scale if isinstance(scale, Tensor) else None


class BeitRelativePositionBias(theirs.BeitRelativePositionBias):
    """transformers' table, gathered by our kernel, and interpolated only for another image size than its own."""

    def forward(
        self, window_size: tuple[int, int], interpolate_pos_encoding: bool = False, dim_size: int | None = None
    ) -> Tensor:
        """(1, H, N, N) for a window of (h, w) patches."""
        own, table = self.window_size, self.relative_position_bias_table
        # `index` makes plain numbers of them in a compiled graph, too: there is one graph for each image size
        window_size = operator.index(window_size[0]), operator.index(window_size[1])
        num_tokens = window_size[0] * window_size[1] + 1
        if own[0] != own[1] or (interpolate_pos_encoding and dim_size != num_tokens):
            return super().forward(window_size, interpolate_pos_encoding, dim_size)  # it reads the table otherwise
        if window_size != tuple(own):
            side = 2 * own[0] - 1
            sheet = table[:-3].reshape(1, side, side, -1).permute(0, 3, 1, 2)
            size = (2 * window_size[0] - 1, 2 * window_size[1] - 1)
            resized = F.interpolate(sheet, size=size, mode="bilinear").permute(0, 2, 3, 1).flatten(0, 2)
            table = torch.cat((resized, table[-3:]))
        bias = relative_position_bias(table, window_size)
        return bias_for_all(bias, bias.unsqueeze(0))


class BeitForMaskedImageModeling(theirs.BeitForMaskedImageModeling):
    """transformers' pre-training model; where labels are given, only masked rows go through its head.

    So they do through the last block after its attention, unless hidden states are requested: nothing else is read.
    """

    @can_return_tuple
    @functools.wraps(theirs.BeitForMaskedImageModeling.forward)  # transformers reads signatures, annotations included
    def forward(
        self,
        pixel_values: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """The loss over the masked positions; the logits of all positions are computed when they are first read."""
        if labels is None or bool_masked_pos is None or torch.compiler.is_compiling() or not self._head_is_stock():
            return super().forward(
                pixel_values, bool_masked_pos, labels, interpolate_pos_encoding, attention_mask, **kwargs
            )
        patches = bool_masked_pos.flatten().nonzero().squeeze(1)
        per_image = bool_masked_pos.flatten(1).shape[1]
        rows = patches + torch.div(patches, per_image, rounding_mode="floor") + 1  # past each CLS token
        last, norm, head = self.beit.layers[-1], self.layernorm, self.lm_head
        row_subset = RowSubset(last, rows) if self._reads_some_rows_only(kwargs) else None
        outputs = self.beit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
            **({} if row_subset is None else {"row_subset": row_subset}),
        )
        hidden = outputs.last_hidden_state
        weights = [norm.weight, norm.bias, head.weight, head.bias]
        all_rows, backbone_norm = None if row_subset is None else row_subset.all_rows, self.beit.layernorm
        if all_rows is not None:  # `hidden` is (M, 1, D)
            rows = torch.arange(len(rows), device=rows.device)
            weights += [*last.parameters(), *backbone_norm.parameters()]
        loss, _ = masked_cross_entropy(
            hidden.flatten(0, 1), rows, labels, norm.weight, norm.bias, head.weight, head.bias, norm.eps
        )
        return LaterLogits.of(
            lambda: head(norm(hidden if all_rows is None else backbone_norm(all_rows()))[:, 1:]),
            weights,
            loss=loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _reads_some_rows_only(self, kwargs: dict[str, Any]) -> bool:
        """Whether the output of the last block goes to the head alone."""
        backbone, last, config = self.beit, self.beit.layers[-1], self.config
        outputs = "output_hidden_states", "output_attentions"
        return (
            not any(kwargs.get(name, getattr(config, name, False)) for name in outputs)
            and not last.gradient_checkpointing
            and is_stock(backbone, theirs.BeitModel)
            and _is_stock_to_transformers(last, BeitLayer)
            and is_stock(backbone.layernorm, nn.LayerNorm, nn.Identity)
            and all(is_stock(m, nn.Linear) for m in (last.attention.o_proj, last.mlp.fc1, last.mlp.fc2))
        )

    def _head_is_stock(self) -> bool:
        return all_stock((self.layernorm, nn.LayerNorm), (self.lm_head, nn.Linear))


FASTER: dict[type[nn.Module], type[nn.Module]] = {
    theirs.BeitLayer: BeitLayer,
    theirs.BeitRelativePositionBias: BeitRelativePositionBias,
    theirs.BeitForMaskedImageModeling: BeitForMaskedImageModeling,
}


def check(model: nn.Module) -> None:
    """Raises ValueError where a BEiT of transformers within `model` is of a kind that has no faster class."""
    for name, module in model.named_modules():
        if type(module) is theirs.BeitLayer and not _exact_gelu(module.mlp.activation_fn):
            raise ValueError(
                f"transformers' BEiT block {name!r} is not supported: its activation is not the exact GELU"
            )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for transformers' `attn_implementation="beit_fast"`; what our op does not do goes to its SDPA.

    Args:
        query, key, value: (B, H, N, K).
        attention_mask: the additive bias (1, H, N, N), any other mask, or None.

    Returns:
        (B, N, H, K), and None for the weights.
    """
    heads, num_tokens = query.shape[1:3]
    own = attention_mask is None or (
        attention_mask.is_floating_point() and attention_mask.shape == (1, heads, num_tokens, num_tokens)
    )
    if dropout or kwargs.get("is_causal") or query.shape != key.shape or query.shape != value.shape or not own:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    bias = None if attention_mask is None else prepared(attention_mask, query.dtype)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return biased_attention(q, k, v, bias, scaling), None


def register() -> None:
    """Makes `attn_implementation="beit_fast"` known to transformers; any of its models may then ask for it."""
    AttentionInterface.register("beit_fast", attention_forward)
    AttentionMaskInterface.register("beit_fast", sdpa_mask)
