# mypy: allow-untyped-defs
"""The Triton kernels around the bias: preparing it, and reducing its gradient over the batch in a fixed order.

A prepared bias is times log2(e), with -inf in the columns that pad the keys (W columns instead of N).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.launch_table import launch, launch_config

LOG2E = math.log2(math.e)


def tail_of(num_tokens: int, tile: int) -> int:
    """Width of the tile that takes what full tiles leave: 0, or the least power of two from 16 on that holds it."""
    rest = num_tokens % tile  # may be symbolic under torch.compile: comparisons only
    return 0 if rest == 0 else next(width for width in (16, 32, 64, 128) if rest <= width)


def padded_width(num_tokens: int) -> int:
    """W, the row length of a prepared bias: whole tiles of 64 and their tail. No kernel walks in wider tiles."""
    return num_tokens // 64 * 64 + tail_of(num_tokens, 64)


def prepared_dtype(dtype: torch.dtype) -> torch.dtype:
    """Beside bf16 inputs fp16 holds the bias more exactly than they hold themselves; beside fp16 only fp32 does."""
    return torch.float16 if dtype == torch.bfloat16 else torch.float32


@triton.jit
def prepare_bias_kernel(
    bias_ptr, padded_ptr, N, W, plane, bias_h, bias_q, bias_k, log2e, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr
):
    """(H, N, N) -> (1 or 2, H, N, W): times log2(e), -inf past the last key; then its transpose, 0 past the last."""
    h = tl.program_id(1).to(tl.int64)
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = queries < N
    base = bias_ptr + h * bias_h
    for start in range(0, W, BLOCK):
        keys = start + tl.arange(0, BLOCK)  # [BLOCK]
        here = inside[:, None] & (keys < N)[None, :]
        offsets = queries.to(tl.int64)[:, None] * bias_q + keys.to(tl.int64)[None, :] * bias_k
        value = tl.load(base + offsets, mask=here, other=0.0).to(tl.float32) * log2e  # [BLOCK, BLOCK]
        value = tl.where((keys < N)[None, :], value, float("-inf"))
        target = padded_ptr + h * N * W + queries.to(tl.int64)[:, None] * W + keys[None, :]
        tl.store(target, value.to(padded_ptr.dtype.element_ty), mask=inside[:, None] & (keys < W)[None, :])
        if TRANSPOSED:
            value = tl.where(here, value, 0.0)
            target = padded_ptr + plane + h * N * W + keys.to(tl.int64)[None, :] * W + queries[:, None]
            mask = (queries < W)[:, None] & (keys < N)[None, :]
            tl.store(target, value.to(padded_ptr.dtype.element_ty), mask=mask)


def prepare_bias(bias: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """(H, N, N) -> (1 or 2, H, N, W) for inputs of `dtype`; the second, transposed copy serves the backward."""
    num_heads, num_tokens, _ = bias.shape
    width = padded_width(num_tokens)
    padded = bias.new_empty(2 if transposed else 1, num_heads, num_tokens, width, dtype=prepared_dtype(dtype))
    config = launch_config("prepare_bias", bias.device)
    launch(
        prepare_bias_kernel, (triton.cdiv(width, config["BLOCK"]), num_heads), bias, padded, num_tokens, width,
        padded[0].numel(), *bias.stride(), LOG2E, TRANSPOSED=transposed, **config,
    )  # fmt: skip
    return padded


@triton.jit(do_not_specialize=["samples"])
def reduce_bias_gradient_kernel(ds_ptr, grad_bias_ptr, samples, N, H, W, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds dS (samples, H, N, W) to (H, N, N) fp32, sample after sample, wherever the samples are cut into chunks."""
    h = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], as all below
    plane = tl.cast(N * W, tl.int64)
    inside = element < N * W
    row = element // W
    column = element % W
    target = grad_bias_ptr + h * N * N + row * N + column
    store = inside & (column < N)
    total = tl.zeros([BLOCK], tl.float32)
    if ACCUMULATE:
        total += tl.load(target, mask=store, other=0.0)
    base = ds_ptr + h * plane
    for _ in range(samples):
        total += tl.load(base + element, mask=inside, other=0.0).to(tl.float32)
        base += H * plane
    tl.store(target, total, mask=store)


def reduce_bias_gradient(ds: Tensor, grad_bias: Tensor, accumulate: bool) -> None:
    """Adds dS (samples, H, N, W) over its samples into grad_bias (H, N, N) fp32, which is set unless `accumulate`."""
    samples, num_heads, num_tokens, width = ds.shape
    config = launch_config("reduce_bias_gradient", ds.device)
    launch(
        reduce_bias_gradient_kernel, (triton.cdiv(num_tokens * width, config["BLOCK"]), num_heads), ds, grad_bias,
        samples, num_tokens, num_heads, width, ACCUMULATE=accumulate, **config,
    )  # fmt: skip
