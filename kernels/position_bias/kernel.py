# mypy: allow-untyped-defs
"""Triton kernels of the relative position bias: the table read for all pairs, and the gradient of the table.

The gradient gathers instead of scattering: a program owns some rows of the table and walks the queries, so every sum
has one owner and one order. No atomics.
"""

import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.launch_table import launch, launch_config
from beit_fast.kernels.position_bias.reference import table_rows
from beit_fast.kernels.tiles import narrow


@triton.jit
def gather_bias_kernel(table_ptr, bias_ptr, h, w, H, N, R, BLOCK: tl.constexpr):
    """BLOCK pairs (query, key) of one head."""
    head = tl.program_id(1)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], as all below
    inside = pair < N * N
    query = pair // N - 1  # -1 is CLS
    key = pair % N - 1
    down = query // w - key // w + h - 1
    right = query % w - key % w + w - 1
    row = down * (2 * w - 1) + right
    row = tl.where(key < 0, R - 2, row)
    row = tl.where(query < 0, tl.where(key < 0, R - 1, R - 3), row)
    value = tl.load(table_ptr + row * H + head, mask=inside, other=0.0)
    tl.store(bias_ptr + tl.cast(head, tl.int64) * N * N + pair, value, mask=inside)


def gather_bias(table: Tensor, height: int, width: int) -> Tensor:
    """(R, H) -> (H, N, N)."""
    num_rows, num_heads = table.shape
    num_tokens = height * width + 1
    bias = table.new_empty(num_heads, num_tokens, num_tokens)
    config = dict(launch_config("gather_bias", table.device))
    launch(
        gather_bias_kernel,
        (triton.cdiv(num_tokens**2, config["BLOCK"]), num_heads),
        table.contiguous(),
        bias,
        height,
        width,
        num_heads,
        num_tokens,
        num_rows,
        **config,
    )
    return bias


@triton.jit
def scatter_table_grad_kernel(grad_ptr, grad_table_ptr, h, w, H, N, R, ROWS: tl.constexpr, QUERIES: tl.constexpr):
    """ROWS rows of the table for one head; the last program of a head takes the three rows of CLS."""
    head = tl.program_id(1)
    base = grad_ptr + tl.cast(head, tl.int64) * N * N
    local = tl.arange(0, QUERIES)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        from_cls = tl.zeros([QUERIES], tl.float32)
        to_cls = tl.zeros([QUERIES], tl.float32)
        for start in range(1, N, QUERIES):
            token = start + local  # [QUERIES]
            from_cls += tl.load(base + token, mask=token < N, other=0.0).to(tl.float32)
            to_cls += tl.load(base + token * N, mask=token < N, other=0.0).to(tl.float32)
        dtype: tl.constexpr = grad_table_ptr.dtype.element_ty
        tl.store(grad_table_ptr + (R - 3) * H + head, narrow(tl.sum(from_cls, 0), dtype))
        tl.store(grad_table_ptr + (R - 2) * H + head, narrow(tl.sum(to_cls, 0), dtype))
        tl.store(grad_table_ptr + (R - 1) * H + head, tl.load(base))
    else:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
        down = row // (2 * w - 1) - (h - 1)
        right = row % (2 * w - 1) - (w - 1)
        total = tl.zeros([QUERIES, ROWS], tl.float32)
        for start in range(0, h * w, QUERIES):
            query = start + local
            key_row = (query // w)[:, None] - down[None, :]  # [QUERIES, ROWS]
            key_column = (query % w)[:, None] - right[None, :]
            valid = (key_row >= 0) & (key_row < h) & (key_column >= 0) & (key_column < w)
            valid = valid & (query < h * w)[:, None] & (row < R - 3)[None, :]
            offset = (query + 1)[:, None] * N + key_row * w + key_column + 1
            total += tl.load(base + offset, mask=valid, other=0.0).to(tl.float32)
        value = narrow(tl.sum(total, 0), grad_table_ptr.dtype.element_ty)
        tl.store(grad_table_ptr + row * H + head, value, mask=row < R - 3)


def scatter_table_grad(grad_bias: Tensor, height: int, width: int) -> Tensor:
    """(H, N, N) -> (R, H), summed in fp32."""
    num_heads, num_tokens, _ = grad_bias.shape
    num_rows = table_rows((height, width))
    grad_table = grad_bias.new_empty(num_rows, num_heads)
    config = dict(launch_config("scatter_table_grad", grad_bias.device))
    launch(
        scatter_table_grad_kernel,
        (triton.cdiv(num_rows - 3, config["ROWS"]) + 1, num_heads),
        grad_bias.contiguous(),
        grad_table,
        height,
        width,
        num_heads,
        num_tokens,
        num_rows,
        **config,
    )
    return grad_table
