# mypy: allow-untyped-defs
"""The Triton kernels around the bias: preparing it, and reducing its gradient over the batch in a fixed order.

A prepared bias is times log2(e), with -inf in the columns that pad the keys (W columns instead of N). The copy that
the backward pass reads is transposed, and for the kernel of `one_pass.py` in fragment order: tiles of KEYS keys, in
them tiles of 16 queries, whose elements lie as the accumulators of the tensor cores hold them.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.launch_table import Config, find_config, launch, launch_config

LOG2E = math.log2(math.e)


def tail_of(num_tokens: int, tile: int) -> int:
    """Width of the tile that takes what full tiles leave: 0, or the least power of two from 16 on that holds it."""
    rest = num_tokens % tile  # may be symbolic under torch.compile: comparisons only
    return 0 if rest == 0 else next(width for width in (16, 32, 64, 128) if rest <= width)


def padded_width(num_tokens: int) -> int:
    """W, the row length of a prepared bias: whole tiles of 64 and their tail. No kernel walks in wider tiles."""
    return num_tokens // 64 * 64 + tail_of(num_tokens, 64)


def one_pass_row(num_tokens: int, device: torch.device) -> Config | None:
    """The launch row of the one-pass backward kernel where the table has it for so many tokens, else None.

    Only a row for exactly this number of tiles of 16 tokens counts: every one takes registers.
    """
    return find_config("attention_backward_one_pass", device, (num_tokens + 15) // 16 * 16)


def prepared_dtype(dtype: torch.dtype) -> torch.dtype:
    """Beside bf16 inputs fp16 holds the bias more exactly than they hold themselves; beside fp16 only fp32 does."""
    return torch.float16 if dtype == torch.bfloat16 else torch.float32


@triton.jit
def prepare_bias_kernel(
    bias_ptr,
    padded_ptr,
    transposed_ptr,
    N,
    W,
    bias_h,
    bias_q,
    bias_k,
    log2e,
    TRANSPOSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(H, N, N) -> (H, N, W): times log2(e), -inf past the last key; its transpose (H, N, W): 0 past the last query."""
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
            target = transposed_ptr + h * N * W + keys.to(tl.int64)[None, :] * W + queries[:, None]
            mask = (queries < W)[:, None] & (keys < N)[None, :]
            tl.store(target, value.to(padded_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fragment_position(element, W, KEYS: tl.constexpr):
    """(key, query) of an element of (tiles, W / 16, 16 * KEYS) in fragment order; the queries of a row are W."""
    tile, rest = element // (KEYS * W), element % (KEYS * W)
    columns, rest = rest // (16 * KEYS), rest % (16 * KEYS)
    key = tile * KEYS + rest // 256 * 16 + rest // 2 % 2 * 8 + rest // 32 % 8
    return key, columns * 16 + rest // 4 % 2 * 8 + rest // 8 % 4 * 2 + rest % 2


@triton.jit
def bias_fragments_kernel(
    bias_ptr, fragments_ptr, N, W, elements, bias_h, bias_q, bias_k, log2e, KEYS: tl.constexpr, BLOCK: tl.constexpr
):
    """(H, N, N) -> (H, elements) in fragment order: times log2(e), -inf past the last key, 0 past the last query."""
    h = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], as all below
    key, query = fragment_position(element, W, KEYS)
    offsets = query.to(tl.int64) * bias_q + key.to(tl.int64) * bias_k
    here = (key < N) & (query < N) & (element < elements)
    value = tl.load(bias_ptr + h * bias_h + offsets, mask=here, other=0.0).to(tl.float32) * log2e
    value = tl.where(key < N, value, float("-inf"))
    tl.store(fragments_ptr + h * elements + element, value.to(fragments_ptr.dtype.element_ty), mask=element < elements)


def transposed_shape(num_heads: int, num_tokens: int, row: Config | None) -> tuple[int, ...]:
    """Of the bias that the backward pass reads, and of dS: (H, N, W), or fragments (H, tiles, columns, 16 * KEYS)."""
    if row is None:
        return num_heads, num_tokens, padded_width(num_tokens)
    columns = num_tokens // row["QUERIES"] * row["QUERIES"] + tail_of(num_tokens, row["QUERIES"])
    return num_heads, triton.cdiv(num_tokens, row["KEYS"]), columns // 16, 16 * row["KEYS"]


def prepare_bias(bias: Tensor, dtype: torch.dtype, transposed: bool, row: Config | None) -> tuple[Tensor, Tensor]:
    """(H, N, N) -> (H, N, W) for inputs of `dtype`, and of `transposed_shape` what the backward reads (or empty)."""
    num_heads, num_tokens, _ = bias.shape
    width = padded_width(num_tokens)
    padded = bias.new_empty((num_heads, num_tokens, width), dtype=prepared_dtype(dtype))
    shape = transposed_shape(num_heads, num_tokens, row) if transposed else (0,)
    backward = padded.new_empty(shape)
    config = launch_config("prepare_bias", bias.device)
    launch(
        prepare_bias_kernel, (triton.cdiv(width, config["BLOCK"]), num_heads), bias, padded, backward, num_tokens,
        width, *bias.stride(), LOG2E, TRANSPOSED=len(shape) == 3, **config,
    )  # fmt: skip
    if len(shape) == 4:
        prepare_fragments(bias, backward)
    return padded, backward


def prepare_fragments(bias: Tensor, fragments: Tensor) -> None:
    """Writes bias (H, N, N) into (H, tiles, W / 16, 16 * KEYS) in fragment order."""
    num_heads, elements = fragments.shape[0], fragments[0].numel()
    config = launch_config("bias_fragments", bias.device)
    launch(
        bias_fragments_kernel, (triton.cdiv(elements, config["BLOCK"]), num_heads), bias, fragments, bias.shape[1],
        fragments.shape[2] * 16, elements, *bias.stride(), LOG2E, KEYS=fragments.shape[3] // 16, **config,
    )  # fmt: skip


@triton.jit(do_not_specialize=["samples"])
def reduce_bias_gradient_kernel(
    ds_ptr, grad_bias_ptr, samples, N, H, W, elements, ACCUMULATE: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds dS (samples, H, elements) to (H, N, N) fp32, sample after sample, wherever the samples are cut into chunks.

    The elements are rows of W keys for each query, or with KEYS > 0 in fragment order.
    """
    h = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], as all below
    if KEYS > 0:
        key, query = fragment_position(element, W, KEYS)
        inside = key // 16 * 16 < N  # the rest was not stored
    else:
        query = element // W
        key = element % W
        inside = element < elements
    target = grad_bias_ptr + h * N * N + query * N + key
    store = inside & (key < N) & (query < N)
    total = tl.zeros([BLOCK], tl.float32)
    if ACCUMULATE:
        total += tl.load(target, mask=store, other=0.0)
    stride = tl.cast(elements, tl.int64)
    base = ds_ptr + h * stride
    for _ in range(samples):
        total += tl.load(base + element, mask=inside, other=0.0).to(tl.float32)
        base += H * stride
    tl.store(target, total, mask=store)


def reduce_bias_gradient(ds: Tensor, grad_bias: Tensor, accumulate: bool) -> None:
    """Adds dS over its samples into grad_bias (H, N, N) fp32, which is set unless `accumulate`.

    Args:
        ds: (samples, H, N, W), or (samples, H, tiles, W / 16, 16 * KEYS) in fragment order.
    """
    samples, num_heads, elements = ds.shape[0], ds.shape[1], ds[0, 0].numel()
    keys, width = (0, ds.shape[3]) if ds.dim() == 4 else (ds.shape[4] // 16, ds.shape[3] * 16)
    config = launch_config("reduce_bias_gradient", ds.device)
    launch(
        reduce_bias_gradient_kernel, (triton.cdiv(elements, config["BLOCK"]), num_heads), ds, grad_bias,
        samples, grad_bias.shape[1], num_heads, width, elements, ACCUMULATE=accumulate, KEYS=keys, **config,
    )  # fmt: skip
