"""Which attention runs where, and the attentions of others under our signature."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels import backend

MAX_HEAD_DIM = 128  # of our kernels


class Choice(NamedTuple):
    """`name` is a name for `use_backend`, or "cpu" for our own CPU implementation; `why` is half a line for people."""

    name: str
    why: str


def choose(device: torch.device, dtype: torch.dtype, head_dim: int, with_bias: bool) -> Choice:
    """The attention that runs on such inputs under the present `use_backend`."""
    wanted = backend.chosen_backend()
    if wanted in ("reference", "sdpa"):
        return Choice(wanted, "chosen by use_backend")
    if device.type == "cpu":
        if wanted == "triton" and backend.interpreting():
            return Choice("triton", "chosen by use_backend, in Triton's interpreter")
        if wanted in ("xformers", "flex"):
            return Choice("cpu", f"{wanted} has no gradient on a CPU")
        return Choice("cpu", "torch's fused kernel; with gradients, batched products a sample at a time")
    if device.type != "cuda":
        return Choice("sdpa", f"our kernels are for CUDA, not {device.type}")
    if wanted in ("xformers", "flex"):
        return Choice(wanted, "chosen by use_backend")
    if not with_bias and wanted == "auto":
        return Choice("sdpa", "without a bias its flash kernels are the fastest")
    if dtype not in (torch.float16, torch.bfloat16):
        return Choice("sdpa", f"our kernels take fp16 and bf16, not {dtype}".replace("torch.", ""))
    if head_dim > MAX_HEAD_DIM:
        return Choice("sdpa", f"our kernels take head dims up to {MAX_HEAD_DIM}")
    obstacle = _obstacle(device.index or 0)
    if obstacle:
        return Choice("sdpa", obstacle)
    return Choice("triton", "adds the learned bias and its gradient within the kernel")


@torch.compiler.assume_constant_result
def _obstacle(index: int) -> str:
    """Why a GPU cannot run our kernels, or ""."""
    if not backend.triton_installed():
        return "Triton is not installed"
    if not backend.device_runs_triton(index):
        return "below compute capability 8.0 Triton emits no tensor-core instructions"
    return ""


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """torch's scaled_dot_product_attention; a bias is handed over as its mask."""
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
