# mypy: allow-untyped-defs
"""The backward kernels of attention: one pass over tiles of queries, one over tiles of keys; no atomics.

Scores, bias, tails and offsets as in `forward.py`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.attention.bias import (
    LOG2E,
    one_pass_row,
    padded_width,
    prepare_bias,
    reduce_bias_gradient,
    transposed_shape,
)
from beit_fast.kernels.attention.forward import config_of, query_scores, tile_rows
from beit_fast.kernels.attention.one_pass import backward_one_pass
from beit_fast.kernels.launch_table import launch
from beit_fast.kernels.tiles import dot, load_tile, narrow, readable, store_tile, strides_of

SCRATCH_BYTES = 512 * 2**20  # of dS at once: the whole batch of BEiT-B at 224 px up to 500 samples


@triton.jit
def _query_step(
    grad_q, q, grad, lse, delta, k_base, v_base, k_n, v_n, bias_base, bias_rows, ds_base, inside, start, N, scale_log2,
    HAS_BIAS: tl.constexpr, STORE_DS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of the scores against one tile of keys: stored if asked for, and multiplied into grad_q."""
    first = tl.cast(start, tl.int64)
    rows = tile_rows(start, N, WIDTH, TAIL)
    k = load_tile(k_base + first * k_n, rows, k_n, K, BLOCK_K)
    v = load_tile(v_base + first * v_n, rows, v_n, K, BLOCK_K)
    scores = query_scores(q, k, bias_base, bias_rows, start, N, scale_log2, HAS_BIAS, WIDTH, TAIL)
    p = tl.exp2(scores - lse[:, None])
    ds = narrow(p * (dot(grad, tl.trans(v)) - delta[:, None]), k.dtype)
    if STORE_DS:
        columns = start + tl.arange(0, WIDTH)
        tl.store(ds_base + bias_rows[:, None] + columns[None, :], ds, mask=inside[:, None])
    return grad_q + dot(ds, k)


@triton.jit(do_not_specialize=["first_pair"])
def attention_backward_query_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, grad_qkv_ptr, delta_ptr, ds_ptr,
    first_pair, N, H, W, scale_log2, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    HAS_BIAS: tl.constexpr, STORE_DS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """grad_q and delta = rowsum(grad * out) of one tile of queries; the tile's rows of dS if the bias wants them.

    Pairs (sample, head) are counted from first_pair, which is also where dS (pairs, N, W) begins.
    """
    tiles = tl.cdiv(N, ROWS)
    local = tl.program_id(0) // tiles
    pair = first_pair + local
    b = (pair // H).to(tl.int64)
    h = (pair % H).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    read = tl.minimum(rows, N - 1)
    k_base = k_ptr + b * k_b + h * k_h
    v_base = v_ptr + b * v_b + h * v_h
    bias_base = bias_ptr + h * N * W
    ds_base = ds_ptr + local.to(tl.int64) * N * W
    out_offset = (b * N * H + h) * K
    grad = load_tile(grad_ptr + out_offset, read, H * K, K, BLOCK_K)
    out = load_tile(out_ptr + out_offset, read, H * K, K, BLOCK_K)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    pair_start = pair.to(tl.int64) * N
    tl.store(delta_ptr + pair_start + rows, delta, mask=inside)
    lse = tl.load(lse_ptr + pair_start + read)
    q = load_tile(q_ptr + b * q_b + h * q_h, read, q_n, K, BLOCK_K)
    grad_q = tl.zeros([ROWS, BLOCK_K], tl.float32)
    full = N // COLS * COLS
    if FULL:
        tl.assume(full > 0)  # else copies for an empty loop come between products and their waits
        for start in range(0, full, COLS):
            grad_q = _query_step(
                grad_q, q, grad, lse, delta, k_base, v_base, k_n, v_n, bias_base, read * W, ds_base, inside, start, N,
                scale_log2, HAS_BIAS, STORE_DS, COLS, False, K, BLOCK_K,
            )  # fmt: skip
    if TAIL > 0:
        grad_q = _query_step(
            grad_q, q, grad, lse, delta, k_base, v_base, k_n, v_n, bias_base, read * W, ds_base, inside, full, N,
            scale_log2, HAS_BIAS, STORE_DS, TAIL, True, K, BLOCK_K,
        )  # fmt: skip
    grad_base = grad_qkv_ptr + (b * N * 3 * H + h) * K
    store_tile(grad_base, rows, 3 * H * K, inside, grad_q * scale, K, BLOCK_K)


@triton.jit
def _key_step(
    grad_k, grad_v, k, v, q_base, grad_base, q_n, grad_n, lse_base, delta_base, bias_base, bias_rows, start, N,
    scale_log2, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of queries joins the gradients of a tile of keys and values; scores are (keys, queries) here.

    Queries past the end have a log-sum-exp of +inf, hence p of 0.
    """
    first = tl.cast(start, tl.int64)
    rows = tile_rows(start, N, WIDTH, TAIL)
    columns = start + tl.arange(0, WIDTH)
    q = load_tile(q_base + first * q_n, rows, q_n, K, BLOCK_K)
    grad = load_tile(grad_base + first * grad_n, rows, grad_n, K, BLOCK_K)
    if TAIL:
        lse = tl.load(lse_base + columns, mask=columns < N, other=float("inf"))
        delta = tl.load(delta_base + columns, mask=columns < N, other=0.0)
    else:
        lse = tl.load(lse_base + columns)
        delta = tl.load(delta_base + columns)
    scores = dot(k, tl.trans(q)) * scale_log2
    if HAS_BIAS:
        scores += tl.load(bias_base + bias_rows[:, None] + columns[None, :]).to(tl.float32)
    p = tl.exp2(scores - lse[None, :])
    grad_v += dot(narrow(p, grad.dtype), grad)
    ds = p * (dot(v, tl.trans(grad)) - delta[None, :])
    grad_k += dot(narrow(ds, q.dtype), q)
    return grad_k, grad_v


@triton.jit
def attention_backward_key_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, grad_qkv_ptr, N, H, W, scale_log2, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    HAS_BIAS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of one tile of keys; `bias_ptr` is the transposed copy (H, keys, W)."""
    tiles = tl.cdiv(N, ROWS)
    pair = tl.program_id(0) // tiles
    b = (pair // H).to(tl.int64)
    h = (pair % H).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    read = tl.minimum(rows, N - 1)
    q_base = q_ptr + b * q_b + h * q_h
    grad_base = grad_ptr + (b * N * H + h) * K
    lse_base = lse_ptr + pair.to(tl.int64) * N
    delta_base = delta_ptr + pair.to(tl.int64) * N
    bias_base = bias_ptr + h * N * W
    k = load_tile(k_ptr + b * k_b + h * k_h, read, k_n, K, BLOCK_K)
    v = load_tile(v_ptr + b * v_b + h * v_h, read, v_n, K, BLOCK_K)
    grad_k = tl.zeros([ROWS, BLOCK_K], tl.float32)
    grad_v = tl.zeros([ROWS, BLOCK_K], tl.float32)
    full = N // COLS * COLS
    if FULL:
        tl.assume(full > 0)  # else copies for an empty loop come between products and their waits
        for start in range(0, full, COLS):
            grad_k, grad_v = _key_step(
                grad_k, grad_v, k, v, q_base, grad_base, q_n, H * K, lse_base, delta_base, bias_base, read * W, start,
                N, scale_log2, HAS_BIAS, COLS, False, K, BLOCK_K,
            )  # fmt: skip
    if TAIL > 0:
        grad_k, grad_v = _key_step(
            grad_k, grad_v, k, v, q_base, grad_base, q_n, H * K, lse_base, delta_base, bias_base, read * W, full, N,
            scale_log2, HAS_BIAS, TAIL, True, K, BLOCK_K,
        )  # fmt: skip
    out_base = grad_qkv_ptr + (b * N * 3 * H + h) * K
    store_tile(out_base + H * K, rows, 3 * H * K, inside, grad_k * scale, K, BLOCK_K)
    store_tile(out_base + 2 * H * K, rows, 3 * H * K, inside, grad_v, K, BLOCK_K)


def samples_per_chunk(batch: int, bytes_of_sample: int) -> int:
    """Samples whose dS is held at once, at least one. Never a property of the device."""
    return max(1, min(batch, SCRATCH_BYTES // bytes_of_sample))


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    padded: Tensor | None,
    transposed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """The packed gradient (B, N, 3, H, K) of q, k, v, and that of the bias (H, N, N) fp32 (or empty)."""
    q, k, v, grad_out = readable(q), readable(k), readable(v), grad_out.contiguous()
    batch, num_tokens, num_heads, head_dim = q.shape
    width = padded_width(num_tokens)
    row = one_pass_row("attention_backward_one_pass", num_tokens, q.device) if head_dim <= 64 and scale > 0 else None
    shape = transposed_shape(num_heads, num_tokens, row)
    plain = padded is not None and (row is not None or padded.dim() == 3)  # the two kernels read that copy as well
    if bias is not None and (transposed is None or transposed.shape != shape or not plain):
        padded, transposed = prepare_bias(bias, q.dtype, True, None, row)  # it was prepared for others, or for none
    grad_qkv = q.new_empty(batch, num_tokens, 3, num_heads, head_dim)
    grad_bias = q.new_empty((num_heads, num_tokens, num_tokens) if need_bias else 0, dtype=torch.float32)
    delta = torch.empty_like(lse)
    chunk = samples_per_chunk(batch, math.prod(shape) * q.element_size()) if need_bias else batch
    ds = q.new_empty((chunk, *shape) if need_bias else 0)
    sizes = (num_tokens, num_heads, width, scale * LOG2E, scale, *strides_of(q, k, v))
    flags = {"HAS_BIAS": padded is not None, "STORE_DS": need_bias}
    padded, transposed = q if padded is None else padded, q if transposed is None else transposed

    config, programs = config_of("attention_backward_query", q)
    for first in range(0, batch, chunk):
        samples = min(chunk, batch - first)
        pointers = (grad_out, q, k, v, padded, out, lse, grad_qkv, delta, ds)
        if row is None:
            launch(
                attention_backward_query_kernel, (programs * samples,), *pointers, first * num_heads, *sizes,
                **flags, **config,
            )  # fmt: skip
        else:
            backward_one_pass(
                grad_out, q, k, v, transposed, out, lse, grad_qkv, delta, ds, first, samples, scale, row, flags
            )
        if need_bias:
            reduce_bias_gradient(ds[:samples], grad_bias, accumulate=first > 0)
    if row is None:
        config, programs = config_of("attention_backward_key", q)
        launch(
            attention_backward_key_kernel, (programs * batch,),
            grad_out, q, k, v, transposed, lse, delta, grad_qkv, *sizes, HAS_BIAS=flags["HAS_BIAS"], **config,
        )  # fmt: skip
    return grad_qkv, grad_bias
