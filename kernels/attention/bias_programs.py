# mypy: allow-untyped-defs
"""The Triton programs around the bias: preparing it, and reducing its gradient over the batch in a fixed order."""

import triton
import triton.language as tl

from beit_fast.kernels.attention.programs import _dot, _load_tile


@triton.jit
def prepare_bias(
    bias_ptr, padded_ptr, N, W, plane, bias_h, bias_q, bias_k, log2e, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr
):
    """(H, N, N) -> (1 or 2, H, N, W): times log2(e), -inf past the last key; then its transpose, 0 past the last."""
    h = tl.program_id(1).to(tl.int64)
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = queries < N
    base = bias_ptr + h * bias_h
    for start in range(0, W, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        here = inside[:, None] & (keys < N)[None, :]
        offsets = queries.to(tl.int64)[:, None] * bias_q + keys.to(tl.int64)[None, :] * bias_k
        value = tl.load(base + offsets, mask=here, other=0.0).to(tl.float32) * log2e
        value = tl.where((keys < N)[None, :], value, float("-inf"))
        target = padded_ptr + h * N * W + queries.to(tl.int64)[:, None] * W + keys[None, :]
        tl.store(target, value.to(padded_ptr.dtype.element_ty), mask=inside[:, None] & (keys < W)[None, :])
        if TRANSPOSED:
            value = tl.where(here, value, 0.0)
            target = padded_ptr + plane + h * N * W + keys.to(tl.int64)[None, :] * W + queries[:, None]
            mask = (queries < W)[:, None] & (keys < N)[None, :]
            tl.store(target, value.to(padded_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["samples"])
def reduce_bias_gradient(ds_ptr, grad_bias_ptr, samples, N, H, W, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds dS (samples, H, N, W) over its samples, in order, into (H, N, N) fp32."""
    h = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.cast(N * W, tl.int64)
    inside = element < N * W
    total = tl.zeros([BLOCK], tl.float32)
    base = ds_ptr + h * plane
    for _ in range(samples):
        total += tl.load(base + element, mask=inside, other=0.0).to(tl.float32)
        base += H * plane
    row = element // W
    column = element % W
    target = grad_bias_ptr + h * N * N + row * N + column
    store = inside & (column < N)
    if ACCUMULATE:
        total += tl.load(target, mask=store, other=0.0)
    tl.store(target, total, mask=store)


@triton.jit(do_not_specialize=["B"])
def bias_gradient(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, grad_bias_ptr, B, N, H, W, scale_log2,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile (queries, keys) of one head's bias gradient without scratch: dS made again, sample after sample."""
    tiles = tl.cdiv(N, COLS)
    h = tl.program_id(1).to(tl.int64)
    queries = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    keys = (tl.program_id(0) % tiles) * COLS + tl.arange(0, COLS)
    read_queries = tl.minimum(queries, N - 1)
    read_keys = tl.minimum(keys, N - 1)
    offsets = h * N * W + read_queries.to(tl.int64)[:, None] * W + keys[None, :]
    bias = tl.load(bias_ptr + offsets, mask=(keys < W)[None, :], other=float("-inf")).to(tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for sample in range(B):
        b = tl.cast(sample, tl.int64)
        q = _load_tile(q_ptr + b * q_b + h * q_h, read_queries, q_n, D, BLOCK_D)
        k = _load_tile(k_ptr + b * k_b + h * k_h, read_keys, k_n, D, BLOCK_D)
        v = _load_tile(v_ptr + b * v_b + h * v_h, read_keys, v_n, D, BLOCK_D)
        grad = _load_tile(grad_ptr + (b * N * H + h) * D, read_queries, H * D, D, BLOCK_D)
        pair_rows = (b * H + h) * N + read_queries
        lse = tl.load(lse_ptr + pair_rows)
        delta = tl.load(delta_ptr + pair_rows)
        weights = tl.exp2(_dot(q, tl.trans(k)) * scale_log2 + bias - lse[:, None])
        total += weights * (_dot(grad, tl.trans(v)) - delta[:, None])
    target = grad_bias_ptr + (h * N + queries.to(tl.int64)[:, None]) * N + keys[None, :]
    tl.store(target, total, mask=(queries < N)[:, None] & (keys < N)[None, :])
