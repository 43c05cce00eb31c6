# mypy: allow-untyped-defs, disable-error-code="assignment"
# ruff: noqa: RUF005 (Triton has no starred expressions)
"""The backward kernel of attention for short sequences: one program per (sample, head), five products, one pass.

Keys are walked in tiles that hold dK and dV; dQ of all queries stays in registers. Scores are (keys, queries), so that
P and dS feed dV and dK from registers. Bias and dS lie in fragment order: tiles of 16 queries as the tensor cores hold
their result, so that both cross from memory to registers without a detour over shared memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.attention.bias import LOG2E, tail_of
from beit_fast.kernels.attention.forward import block_of, strides_of
from beit_fast.kernels.launch_table import Config, launch
from beit_fast.kernels.tiles import dot, load_tile, narrow, store_tile


@triton.jit
def _from_fragments(x, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """[KEYS * WIDTH] in fragment order -> [KEYS, WIDTH]."""
    x = x.reshape([WIDTH // 16, KEYS // 16, 8, 4, 2, 2, 2])
    return x.permute(1, 5, 2, 0, 4, 3, 6).reshape([KEYS, WIDTH])


@triton.jit
def _to_fragments(x, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `_from_fragments`."""
    x = x.reshape([KEYS // 16, 2, 8, WIDTH // 16, 2, 4, 2])
    return x.permute(3, 0, 2, 5, 4, 1, 6).reshape([KEYS * WIDTH])


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


def one_pass(
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
