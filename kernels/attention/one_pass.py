# mypy: allow-untyped-defs, disable-error-code="assignment,misc"
# ruff: noqa: RUF005 (Triton has no starred expressions)
"""The kernels of attention for short sequences: one program per (sample, head) and pass.

Forward, keys and values stay in shared memory and every softmax sees all of its row. Backward, keys are walked in tiles
that hold dK and dV, and dQ of all queries stays in registers; scores are (keys, queries), so that P and dS feed dV and
dK from registers. Bias and dS lie in fragment order (`bias.py`), and cross from memory to registers as they are.
"""

import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.attention.bias import LOG2E, one_pass_columns, tail_of
from beit_fast.kernels.launch_table import Config, launch
from beit_fast.kernels.tiles import block_of, dot, load_tile, narrow, store_tile, strides_of


@triton.jit
def _from_fragments(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS * WIDTH] in fragment order -> [ROWS, WIDTH]."""
    x = x.reshape([WIDTH // 16, ROWS // 16, 8, 4, 2, 2, 2])
    return x.permute(1, 5, 2, 0, 4, 3, 6).reshape([ROWS, WIDTH])


@triton.jit
def _to_fragments(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `_from_fragments`."""
    x = x.reshape([ROWS // 16, 2, 8, WIDTH // 16, 2, 4, 2])
    return x.permute(3, 0, 2, 5, 4, 1, 6).reshape([ROWS * WIDTH])


@triton.jit
def _load_keys(
    k_base, v_base, k_n, v_n, N, START: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Keys and values from START on, [WIDTH, BLOCK_K] each; those past the end repeat the last."""
    rows = tl.minimum(START + tl.arange(0, WIDTH), N - 1)
    return load_tile(k_base, rows, k_n, K, BLOCK_K), load_tile(v_base, rows, v_n, K, BLOCK_K)


@triton.jit
def _row_scores(
    q, k, bias_tile, N, inverse_scale, HAS_BIAS: tl.constexpr, START: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Scores [ROWS, WIDTH] in units of q k^T; the product starts at the bias, -inf past the last key."""
    if HAS_BIAS:
        bias = tl.load(bias_tile + START * ROWS + tl.arange(0, ROWS * WIDTH))
        scores = _from_fragments(bias, ROWS, WIDTH).to(tl.float32) * inverse_scale
    else:
        keys = START + tl.arange(0, WIDTH)
        scores = tl.where((keys < N)[None, :], tl.zeros([ROWS, WIDTH], tl.float32), float("-inf"))
    return dot(q, tl.trans(k), scores)


@triton.jit
def attention_forward_one_pass_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, N, H, scale_log2, inverse_scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    HAS_BIAS: tl.constexpr, SAVE_LSE: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, COUNT: tl.constexpr, HALF: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """All queries of one (sample, head), ROWS at a time; COUNT tiles of COLS keys, one of HALF and one of TAIL."""
    pair = tl.program_id(0)
    b = (pair // H).to(tl.int64)
    h = (pair % H).to(tl.int64)
    q_base = q_ptr + b * q_b + h * q_h
    k_base = k_ptr + b * k_b + h * k_h
    v_base = v_ptr + b * v_b + h * v_h
    MIDDLE: tl.constexpr = COUNT * COLS
    LAST: tl.constexpr = COUNT * COLS + HALF
    W: tl.constexpr = COUNT * COLS + HALF + TAIL
    bias_base = bias_ptr + h * (tl.cdiv(N, ROWS) * ROWS * W)
    out_base = out_ptr + (b * N * H + h) * K
    ks, vs = (), ()
    for i in tl.static_range(COUNT):
        k, v = _load_keys(k_base, v_base, k_n, v_n, N, i * COLS, COLS, K, BLOCK_K)
        ks, vs = ks + (k,), vs + (v,)
    if HALF > 0:
        k, v = _load_keys(k_base, v_base, k_n, v_n, N, MIDDLE, HALF, K, BLOCK_K)
        ks, vs = ks + (k,), vs + (v,)
    if TAIL > 0:
        k, v = _load_keys(k_base, v_base, k_n, v_n, N, LAST, TAIL, K, BLOCK_K)
        ks, vs = ks + (k,), vs + (v,)
    tl.assume(N > 0)
    for start in range(0, N, ROWS):
        rows = start + tl.arange(0, ROWS)  # [ROWS]
        q = load_tile(q_base, tl.minimum(rows, N - 1), q_n, K, BLOCK_K)  # [ROWS, BLOCK_K]
        bias_tile = bias_base + start * W
        scores = ()
        for i in tl.static_range(COUNT):
            scores = scores + (_row_scores(q, ks[i], bias_tile, N, inverse_scale, HAS_BIAS, i * COLS, ROWS, COLS),)
        if HALF > 0:
            scores = scores + (_row_scores(q, ks[COUNT], bias_tile, N, inverse_scale, HAS_BIAS, MIDDLE, ROWS, HALF),)
        if TAIL > 0:
            last = _row_scores(q, ks[len(ks) - 1], bias_tile, N, inverse_scale, HAS_BIAS, LAST, ROWS, TAIL)
            scores = scores + (last,)
        m_i = tl.max(scores[0], 1)
        for i in tl.static_range(1, len(scores)):
            m_i = tl.maximum(m_i, tl.max(scores[i], 1))
        m_i = m_i * scale_log2
        l_i = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
        for i in tl.static_range(len(scores)):
            p = tl.exp2(scores[i] * scale_log2 - m_i[:, None])
            l_i += tl.sum(p, 1)
            acc = dot(narrow(p, vs[i].dtype), vs[i], acc)
        store_tile(out_base, rows, H * K, rows < N, acc / l_i[:, None], K, BLOCK_K)
        if SAVE_LSE:
            tl.store(lse_ptr + pair.to(tl.int64) * N + rows, m_i + tl.log2(l_i), mask=rows < N)


def forward_one_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fragments: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    row: Config,
    flags: dict[str, bool],
) -> None:
    """Writes the output and, where asked for, log-sum-exp in base 2; `fragments` have queries as rows."""
    batch, num_tokens, num_heads, head_dim = q.shape
    count, half, tail = one_pass_columns(num_tokens, row["COLS"])
    launch(
        attention_forward_one_pass_kernel, (batch * num_heads,), q, k, v, fragments, out, lse, num_tokens, num_heads,
        scale * LOG2E, 1.0 / (scale * LOG2E), *strides_of(q, k, v), K=head_dim, BLOCK_K=block_of(head_dim),
        COUNT=count, HALF=half, TAIL=tail, **flags, **row,
    )  # fmt: skip


@triton.jit
def _query_tile(
    dq, dk, dv, k, v, q, grad, lse_base, delta_base, bias_tile, ds_tile, key_start, N,
    scale_log2, inverse_scale, HAS_BIAS: tl.constexpr, STORE_DS: tl.constexpr, START: tl.constexpr,
    WIDTH: tl.constexpr, KEYS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The five products of one tile of keys and one of queries. Queries past the end have weights of 0."""
    columns = START + tl.arange(0, WIDTH)  # [WIDTH]
    lse = tl.load(lse_base + columns, mask=columns < N, other=float("inf"))  # [WIDTH]
    delta = tl.load(delta_base + columns, mask=columns < N, other=0.0)  # [WIDTH]
    element = tl.arange(0, KEYS * WIDTH)  # in fragment order
    if HAS_BIAS:
        scores = _from_fragments(tl.load(bias_tile + START * KEYS + element), KEYS, WIDTH).to(tl.float32)
    else:
        keys = key_start + tl.arange(0, KEYS)
        scores = tl.where((keys < N)[:, None] & (columns >= 0)[None, :], 0.0, float("-inf"))
    # the products start at bias - log-sum-exp, in units of q k^T, and at -delta: two passes less
    scores = dot(k, tl.trans(q), (scores - lse[None, :]) * inverse_scale)  # [KEYS, WIDTH]
    p = tl.exp2(scores * scale_log2)
    dv = dot(narrow(p, grad.dtype), grad, dv)
    dp = dot(v, tl.trans(grad), tl.zeros([KEYS, WIDTH], tl.float32) - delta[None, :])  # [KEYS, WIDTH]
    ds = narrow(p * dp, q.dtype)
    if STORE_DS:  # but rows of 16 keys wholly past the end
        stored = key_start + (element % (16 * KEYS)) // 256 * 16 < N
        tl.store(ds_tile + START * KEYS + element, _to_fragments(ds, KEYS, WIDTH), mask=stored)
    dk = dot(ds, q, dk)
    dq = dot(tl.trans(k), ds, dq)  # [BLOCK_K, WIDTH]
    return dq, dk, dv


@triton.jit(do_not_specialize=["first_pair"])
def attention_backward_one_pass_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, grad_qkv_ptr, delta_ptr, ds_ptr,
    first_pair, N, H, scale_log2, inverse_scale, scale,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    HAS_BIAS: tl.constexpr, STORE_DS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, COUNT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """All gradients of one (sample, head); COUNT tiles of QUERIES queries, and one of TAIL."""
    local = tl.program_id(0)
    pair = first_pair + local
    b = (pair // H).to(tl.int64)
    h = (pair % H).to(tl.int64)
    q_base = q_ptr + b * q_b + h * q_h
    k_base = k_ptr + b * k_b + h * k_h
    v_base = v_ptr + b * v_b + h * v_h
    out_offset = (b * N * H + h) * K
    grad_base = grad_ptr + out_offset
    lse_base = lse_ptr + pair.to(tl.int64) * N
    delta_base = delta_ptr + pair.to(tl.int64) * N
    W: tl.constexpr = COUNT * QUERIES + TAIL
    plane = tl.cdiv(N, KEYS) * KEYS * W
    bias_base = bias_ptr + h * plane
    ds_base = ds_ptr + local.to(tl.int64) * plane
    for start in range(0, N, 64):
        rows = start + tl.arange(0, 64)  # [64]
        read = tl.minimum(rows, N - 1)
        grad = load_tile(grad_base, read, H * K, K, BLOCK_K).to(tl.float32)  # [64, BLOCK_K]
        out = load_tile(out_ptr + out_offset, read, H * K, K, BLOCK_K).to(tl.float32)  # [64, BLOCK_K]
        tl.store(delta_base + rows, tl.sum(grad * out, 1), mask=rows < N)
    tl.debug_barrier()  # delta is read by other threads than wrote it
    dqs, qs, grads = (), (), ()
    for i in tl.static_range(COUNT):
        rows = i * QUERIES + tl.arange(0, QUERIES)
        qs = qs + (load_tile(q_base, rows, q_n, K, BLOCK_K),)  # [QUERIES, BLOCK_K]
        grads = grads + (load_tile(grad_base, rows, H * K, K, BLOCK_K),)
        dqs = dqs + (tl.zeros([BLOCK_K, QUERIES], tl.float32),)
    if TAIL > 0:
        rows = tl.minimum(COUNT * QUERIES + tl.arange(0, TAIL), N - 1)
        qs = qs + (load_tile(q_base, rows, q_n, K, BLOCK_K),)  # [TAIL, BLOCK_K]
        grads = grads + (load_tile(grad_base, rows, H * K, K, BLOCK_K),)
        dqs = dqs + (tl.zeros([BLOCK_K, TAIL], tl.float32),)
    tl.assume(N > 0)
    for key_start in range(0, N, KEYS):
        keys = key_start + tl.arange(0, KEYS)  # [KEYS]
        read = tl.minimum(keys, N - 1)
        k = load_tile(k_base, read, k_n, K, BLOCK_K)  # [KEYS, BLOCK_K]
        v = load_tile(v_base, read, v_n, K, BLOCK_K)  # [KEYS, BLOCK_K]
        dk = tl.zeros([KEYS, BLOCK_K], tl.float32)
        dv = tl.zeros([KEYS, BLOCK_K], tl.float32)
        bias_tile = bias_base + key_start * W
        ds_tile = ds_base + key_start * W
        new = ()
        for i in tl.static_range(COUNT):
            dq, dk, dv = _query_tile(
                dqs[i], dk, dv, k, v, qs[i], grads[i], lse_base, delta_base, bias_tile, ds_tile,
                key_start, N, scale_log2, inverse_scale, HAS_BIAS, STORE_DS, i * QUERIES, QUERIES, KEYS, K, BLOCK_K,
            )  # fmt: skip
            new = new + (dq,)
        if TAIL > 0:
            dq, dk, dv = _query_tile(
                dqs[COUNT], dk, dv, k, v, qs[COUNT], grads[COUNT], lse_base, delta_base, bias_tile, ds_tile,
                key_start, N, scale_log2, inverse_scale, HAS_BIAS, STORE_DS, COUNT * QUERIES, TAIL, KEYS, K, BLOCK_K,
            )  # fmt: skip
            new = new + (dq,)
        dqs = new
        dk_base = grad_qkv_ptr + ((b * N * 3 + 1) * H + h) * K
        store_tile(dk_base, keys, 3 * H * K, keys < N, dk * scale, K, BLOCK_K)
        store_tile(dk_base + H * K, keys, 3 * H * K, keys < N, dv, K, BLOCK_K)
    dq_base = grad_qkv_ptr + (b * N * 3 * H + h) * K
    for i in tl.static_range(COUNT):
        rows = i * QUERIES + tl.arange(0, QUERIES)
        store_tile(dq_base, rows, 3 * H * K, rows < N, tl.trans(dqs[i]) * scale, K, BLOCK_K)
    if TAIL > 0:
        rows = COUNT * QUERIES + tl.arange(0, TAIL)
        store_tile(dq_base, rows, 3 * H * K, rows < N, tl.trans(dqs[COUNT]) * scale, K, BLOCK_K)


def backward_one_pass(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fragments: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_qkv: Tensor,
    delta: Tensor,
    ds: Tensor,
    first: int,
    samples: int,
    scale: float,
    row: Config,
    flags: dict[str, bool],
) -> None:
    """Writes the packed gradient of q, k, v of `samples` samples from `first` on, and their dS in fragment order."""
    _, num_tokens, num_heads, head_dim = q.shape
    queries = row["QUERIES"]
    launch(
        attention_backward_one_pass_kernel, (samples * num_heads,),
        grad_out, q, k, v, fragments, out, lse, grad_qkv, delta, ds, first * num_heads, num_tokens, num_heads,
        scale * LOG2E, 1.0 / (scale * LOG2E), scale, *strides_of(q, k, v), K=head_dim, BLOCK_K=block_of(head_dim),
        COUNT=num_tokens // queries, TAIL=tail_of(num_tokens, queries), **flags, **row,
    )  # fmt: skip
