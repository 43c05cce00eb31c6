# mypy: allow-untyped-defs
"""The Triton programs of attention with an additive bias.

Scores live in base 2, s = (q k^T) * scale * log2(e) + bias * log2(e), so that every exponential is one exp2. The bias
comes prepared: times log2(e), with -inf in the columns that pad the keys (W columns instead of N), which is then the
only mask. Keys, or queries, are walked in full tiles and then one narrower tail; places past the end read the last row
again and are never stored. Offsets are int64 per program and per tile, int32 within a tile.
"""

import triton
import triton.language as tl

from beit_fast.kernels.rounding import INTERPRETED, narrow


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # the interpreter multiplies the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load_tile(base, rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a (tokens, D) matrix with unit column stride; columns past D are 0."""
    dims = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * stride + dims[None, :]
    if BLOCK_D == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def _store_tile(base, rows, stride, inside, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    dims = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if BLOCK_D != D:
        mask = mask & (dims < D)[None, :]
    tl.store(base + rows[:, None] * stride + dims[None, :], narrow(value, base.dtype.element_ty), mask=mask)


@triton.jit
def _places(start, N, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """Offsets from `start` of a tile's rows; in the tail those past the end name the last row."""
    local = tl.arange(0, WIDTH)
    if TAIL:
        local = tl.minimum(local, N - 1 - start)
    return local


@triton.jit
def _query_scores(
    q, k, bias_base, bias_rows, start, N, scale_log2, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr
):
    """Scores (queries, keys) of one tile of keys, -inf past the last key."""
    columns = start + tl.arange(0, WIDTH)
    scores = _dot(q, tl.trans(k)) * scale_log2
    if HAS_BIAS:
        scores += tl.load(bias_base + bias_rows[:, None] + columns[None, :]).to(tl.float32)
    elif TAIL:
        scores = tl.where((columns < N)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _forward_step(
    acc, peak, total, q, k_base, v_base, k_n, v_n, bias_base, bias_rows, start, N, scale_log2,
    HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The running softmax takes in one tile of keys and values."""
    first = tl.cast(start, tl.int64)
    places = _places(start, N, WIDTH, TAIL)
    k = _load_tile(k_base + first * k_n, places, k_n, D, BLOCK_D)
    v = _load_tile(v_base + first * v_n, places, v_n, D, BLOCK_D)
    scores = _query_scores(q, k, bias_base, bias_rows, start, N, scale_log2, HAS_BIAS, WIDTH, TAIL)
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + _dot(narrow(weights, v.dtype), v)
    return acc, new_peak, total


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, N, H, W, scale_log2,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    HAS_BIAS: tl.constexpr, SAVE_LSE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one (sample, head); the tiles of a pair are neighbours, so its keys stay in the cache."""
    tiles = tl.cdiv(N, ROWS)
    pair = tl.program_id(0) // tiles
    b = (pair // H).to(tl.int64)
    h = (pair % H).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    inside = rows < N
    read = tl.minimum(rows, N - 1)
    k_base = k_ptr + b * k_b + h * k_h
    v_base = v_ptr + b * v_b + h * v_h
    bias_base = bias_ptr + h * N * W
    q = _load_tile(q_ptr + b * q_b + h * q_h, read, q_n, D, BLOCK_D)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    full = N // COLS * COLS
    for start in range(0, full, COLS):
        acc, peak, total = _forward_step(
            acc, peak, total, q, k_base, v_base, k_n, v_n, bias_base, read * W, start, N, scale_log2,
            HAS_BIAS, COLS, False, D, BLOCK_D,
        )  # fmt: skip
    if TAIL > 0:
        acc, peak, total = _forward_step(
            acc, peak, total, q, k_base, v_base, k_n, v_n, bias_base, read * W, full, N, scale_log2,
            HAS_BIAS, TAIL, True, D, BLOCK_D,
        )  # fmt: skip
    out_base = out_ptr + (b * N * H + h) * D
    _store_tile(out_base, rows, H * D, inside, acc / total[:, None], D, BLOCK_D)
    if SAVE_LSE:
        tl.store(lse_ptr + pair.to(tl.int64) * N + rows, peak + tl.log2(total), mask=inside)


@triton.jit
def _query_step(
    grad_q, q, grad, lse, delta, k_base, v_base, k_n, v_n, bias_base, bias_rows, ds_base, inside, start, N, scale_log2,
    HAS_BIAS: tl.constexpr, STORE_DS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of the scores against one tile of keys: stored if asked for, and multiplied into grad_q."""
    first = tl.cast(start, tl.int64)
    places = _places(start, N, WIDTH, TAIL)
    k = _load_tile(k_base + first * k_n, places, k_n, D, BLOCK_D)
    v = _load_tile(v_base + first * v_n, places, v_n, D, BLOCK_D)
    scores = _query_scores(q, k, bias_base, bias_rows, start, N, scale_log2, HAS_BIAS, WIDTH, TAIL)
    weights = tl.exp2(scores - lse[:, None])
    ds = narrow(weights * (_dot(grad, tl.trans(v)) - delta[:, None]), k.dtype)
    if STORE_DS:
        columns = start + tl.arange(0, WIDTH)
        tl.store(ds_base + bias_rows[:, None] + columns[None, :], ds, mask=inside[:, None])
    return grad_q + _dot(ds, k)


@triton.jit(do_not_specialize=["first_pair"])
def attention_backward_query(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, grad_qkv_ptr, delta_ptr, ds_ptr,
    first_pair, N, H, W, scale_log2, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    HAS_BIAS: tl.constexpr, STORE_DS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TAIL: tl.constexpr,
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
    out_offset = (b * N * H + h) * D
    grad = _load_tile(grad_ptr + out_offset, read, H * D, D, BLOCK_D)
    out = _load_tile(out_ptr + out_offset, read, H * D, D, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    pair_start = pair.to(tl.int64) * N
    tl.store(delta_ptr + pair_start + rows, delta, mask=inside)
    lse = tl.load(lse_ptr + pair_start + read)
    q = _load_tile(q_ptr + b * q_b + h * q_h, read, q_n, D, BLOCK_D)
    grad_q = tl.zeros([ROWS, BLOCK_D], tl.float32)
    full = N // COLS * COLS
    for start in range(0, full, COLS):
        grad_q = _query_step(
            grad_q, q, grad, lse, delta, k_base, v_base, k_n, v_n, bias_base, read * W, ds_base, inside, start, N,
            scale_log2, HAS_BIAS, STORE_DS, COLS, False, D, BLOCK_D,
        )  # fmt: skip
    if TAIL > 0:
        grad_q = _query_step(
            grad_q, q, grad, lse, delta, k_base, v_base, k_n, v_n, bias_base, read * W, ds_base, inside, full, N,
            scale_log2, HAS_BIAS, STORE_DS, TAIL, True, D, BLOCK_D,
        )  # fmt: skip
    grad_base = grad_qkv_ptr + (b * N * 3 * H + h) * D
    _store_tile(grad_base, rows, 3 * H * D, inside, grad_q * scale, D, BLOCK_D)


@triton.jit
def _key_step(
    grad_k, grad_v, k, v, q_base, grad_base, q_n, grad_n, lse_base, delta_base, bias_base, bias_rows, start, N,
    scale_log2, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of queries joins the gradients of a tile of keys and values; scores are (keys, queries) here.

    Queries past the end have a log-sum-exp of +inf, hence weights of 0.
    """
    first = tl.cast(start, tl.int64)
    places = _places(start, N, WIDTH, TAIL)
    columns = start + tl.arange(0, WIDTH)
    q = _load_tile(q_base + first * q_n, places, q_n, D, BLOCK_D)
    grad = _load_tile(grad_base + first * grad_n, places, grad_n, D, BLOCK_D)
    if TAIL:
        lse = tl.load(lse_base + columns, mask=columns < N, other=float("inf"))
        delta = tl.load(delta_base + columns, mask=columns < N, other=0.0)
    else:
        lse = tl.load(lse_base + columns)
        delta = tl.load(delta_base + columns)
    scores = _dot(k, tl.trans(q)) * scale_log2
    if HAS_BIAS:
        scores += tl.load(bias_base + bias_rows[:, None] + columns[None, :]).to(tl.float32)
    weights = tl.exp2(scores - lse[None, :])
    grad_v += _dot(narrow(weights, grad.dtype), grad)
    ds = weights * (_dot(v, tl.trans(grad)) - delta[None, :])
    grad_k += _dot(narrow(ds, q.dtype), q)
    return grad_k, grad_v


@triton.jit
def attention_backward_key(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, lse_ptr, delta_ptr, grad_qkv_ptr, N, H, W, scale_log2, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    HAS_BIAS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, TAIL: tl.constexpr,
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
    grad_base = grad_ptr + (b * N * H + h) * D
    lse_base = lse_ptr + pair.to(tl.int64) * N
    delta_base = delta_ptr + pair.to(tl.int64) * N
    bias_base = bias_ptr + h * N * W
    k = _load_tile(k_ptr + b * k_b + h * k_h, read, k_n, D, BLOCK_D)
    v = _load_tile(v_ptr + b * v_b + h * v_h, read, v_n, D, BLOCK_D)
    grad_k = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_v = tl.zeros([ROWS, BLOCK_D], tl.float32)
    full = N // COLS * COLS
    for start in range(0, full, COLS):
        grad_k, grad_v = _key_step(
            grad_k, grad_v, k, v, q_base, grad_base, q_n, H * D, lse_base, delta_base, bias_base, read * W, start, N,
            scale_log2, HAS_BIAS, COLS, False, D, BLOCK_D,
        )  # fmt: skip
    if TAIL > 0:
        grad_k, grad_v = _key_step(
            grad_k, grad_v, k, v, q_base, grad_base, q_n, H * D, lse_base, delta_base, bias_base, read * W, full, N,
            scale_log2, HAS_BIAS, TAIL, True, D, BLOCK_D,
        )  # fmt: skip
    out_base = grad_qkv_ptr + (b * N * 3 * H + h) * D
    _store_tile(out_base + H * D, rows, 3 * H * D, inside, grad_k * scale, D, BLOCK_D)
    _store_tile(out_base + 2 * H * D, rows, 3 * H * D, inside, grad_v, D, BLOCK_D)
