"""The attentions of others under our signature: q, k, v (B, N, H, K), bias (H, N, N) or None -> (B, N, H, K)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """torch's scaled_dot_product_attention, with the bias as its mask."""
    mask = None if bias is None else bias.to(q.dtype).unsqueeze(0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """xformers' memory_efficient_attention; a bias is written out for every sample, in rows of a multiple of 8."""
    from xformers.ops import memory_efficient_attention

    if bias is not None:
        num_tokens = bias.shape[-1]
        aligned = F.pad(bias.to(q.dtype), (0, -num_tokens % 8))[..., :num_tokens]
        bias = aligned.unsqueeze(0).expand(q.shape[0], -1, -1, -1)
    return memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """FlexAttention with the bias gathered in its score_mod, compiled; without gradients also on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score if bias is None else score + bias[h, i, j]

    run = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return run(q, k, v, score_mod=None if bias is None else add_bias, scale=scale).transpose(1, 2)


OTHERS = {"sdpa": sdpa, "xformers": xformers, "flex": flex}
