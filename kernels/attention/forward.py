# mypy: allow-untyped-defs
"""The forward kernel of attention with an additive bias.

Scores live in base 2, s = (q k^T) * scale * log2(e) + bias * log2(e), so that every exponential is one exp2. The bias
comes prepared (`bias.py`), and is then the only mask. Keys are walked in full tiles and then one narrower tail; rows
past the end read the last row again and are never stored. Offsets are int64 per program and tile, int32 within a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.attention.bias import (
    LOG2E,
    one_pass_rows,
    padded_shape,
    padded_width,
    prepare_bias,
    tail_of,
)
from beit_fast.kernels.attention.one_pass import forward_one_pass
from beit_fast.kernels.launch_table import launch, launch_config
from beit_fast.kernels.tiles import block_of, dot, load_tile, narrow, readable, store_tile, strides_of


@triton.jit
def tile_rows(start, N, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """Offsets from `start` of a tile's rows [WIDTH]; in the tail those past the end name the last row."""
    local = tl.arange(0, WIDTH)
    if TAIL:
        local = tl.minimum(local, N - 1 - start)
    return local


@triton.jit
def query_scores(
    q, k, bias_base, bias_rows, start, N, scale_log2, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr
):
    """Scores [ROWS, WIDTH] of queries and one tile of keys, -inf past the last key."""
    columns = start + tl.arange(0, WIDTH)
    scores = dot(q, tl.trans(k)) * scale_log2
    if HAS_BIAS:
        scores += tl.load(bias_base + bias_rows[:, None] + columns[None, :]).to(tl.float32)
    elif TAIL:
        scores = tl.where((columns < N)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _forward_step(
    acc, m_i, l_i, q, k_base, v_base, k_n, v_n, bias_base, bias_rows, start, N, scale_log2,
    HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The running softmax takes in one tile of keys and values."""
    first = tl.cast(start, tl.int64)
    rows = tile_rows(start, N, WIDTH, TAIL)
    k = load_tile(k_base + first * k_n, rows, k_n, K, BLOCK_K)  # [WIDTH, BLOCK_K]
    v = load_tile(v_base + first * v_n, rows, v_n, K, BLOCK_K)  # [WIDTH, BLOCK_K]
    scores = query_scores(q, k, bias_base, bias_rows, start, N, scale_log2, HAS_BIAS, WIDTH, TAIL)
    m_new = tl.maximum(m_i, tl.max(scores, 1))  # [ROWS]
    p = tl.exp2(scores - m_new[:, None])  # [ROWS, WIDTH]
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None] + dot(narrow(p, v.dtype), v)
    return acc, m_new, l_i


@triton.jit
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, N, H, W, scale_log2,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    HAS_BIAS: tl.constexpr, SAVE_LSE: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one (sample, head); the tiles of a pair are neighbours, so its keys stay in the cache."""
    tiles = tl.cdiv(N, ROWS)
    pair = tl.program_id(0) // tiles
    b = (pair // H).to(tl.int64)
    h = (pair % H).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    inside = rows < N
    read = tl.minimum(rows, N - 1)
    k_base = k_ptr + b * k_b + h * k_h
    v_base = v_ptr + b * v_b + h * v_h
    bias_base = bias_ptr + h * N * W
    q = load_tile(q_ptr + b * q_b + h * q_h, read, q_n, K, BLOCK_K)  # [ROWS, BLOCK_K]
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    m_i = tl.full([ROWS], float("-inf"), tl.float32)
    l_i = tl.zeros([ROWS], tl.float32)
    full = N // COLS * COLS
    if FULL:
        tl.assume(full > 0)  # else copies for an empty loop come between products and their waits
        for start in range(0, full, COLS):
            acc, m_i, l_i = _forward_step(
                acc, m_i, l_i, q, k_base, v_base, k_n, v_n, bias_base, read * W, start, N, scale_log2,
                HAS_BIAS, COLS, False, K, BLOCK_K,
            )  # fmt: skip
    if TAIL > 0:
        acc, m_i, l_i = _forward_step(
            acc, m_i, l_i, q, k_base, v_base, k_n, v_n, bias_base, read * W, full, N, scale_log2,
            HAS_BIAS, TAIL, True, K, BLOCK_K,
        )  # fmt: skip
    out_base = out_ptr + (b * N * H + h) * K
    store_tile(out_base, rows, H * K, inside, acc / l_i[:, None], K, BLOCK_K)
    if SAVE_LSE:
        tl.store(lse_ptr + pair.to(tl.int64) * N + rows, m_i + tl.log2(l_i), mask=inside)


def config_of(name: str, q: Tensor) -> tuple[dict[str, int], int]:
    """The launch row of a kernel that walks N tokens with its shape constants, and its number of programs a sample."""
    _, num_tokens, num_heads, head_dim = q.shape
    block = block_of(head_dim)
    config = dict(launch_config(name, q.device, block))
    config |= {"K": head_dim, "BLOCK_K": block}
    config |= {"FULL": num_tokens >= config["COLS"], "TAIL": tail_of(num_tokens, config["COLS"])}
    return config, triton.cdiv(num_tokens, config["ROWS"]) * num_heads


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, padded: Tensor | None, scale: float, save: bool
) -> tuple[Tensor, Tensor]:
    """(B, N, H, K) three times -> the output (B, N, H, K), and log-sum-exp (B, H, N) fp32 in base 2 (or empty).

    Args:
        bias: (H, N, N), prepared again where `padded` was prepared for another kernel.
    """
    q, k, v = readable(q), readable(k), readable(v)
    batch, num_tokens, num_heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((batch, num_heads, num_tokens) if save else 0, dtype=torch.float32)
    flags = {"HAS_BIAS": bias is not None, "SAVE_LSE": save}
    row = one_pass_rows(num_tokens, q.device)[0] if head_dim <= 64 and scale > 0 else None
    if bias is not None and (padded is None or padded.shape != padded_shape(num_heads, num_tokens, row)):
        padded, _ = prepare_bias(bias, q.dtype, False, row, None)
    given = q if padded is None else padded
    if row is not None:
        forward_one_pass(q, k, v, given, out, lse, scale, row, flags)
        return out, lse
    config, programs = config_of("attention_forward", q)
    launch(
        attention_forward_kernel, (programs * batch,), q, k, v, given, out, lse,
        num_tokens, num_heads, padded_width(num_tokens), scale * LOG2E, *strides_of(q, k, v), **flags, **config,
    )  # fmt: skip
    return out, lse
