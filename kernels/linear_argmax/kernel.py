# mypy: allow-untyped-defs
"""Triton kernel of `linear_argmax`: a program walks all columns for some rows, the logits stay in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.launch_table import launch, launch_config
from beit_fast.kernels.tiles import block_of, dot


@triton.jit
def linear_argmax_kernel(
    rows_ptr, weight_ptr, bias_ptr, ids_ptr, P, V, C, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    dims = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    inside = (rows < P)[:, None] & (dims < C)[None, :]
    x = tl.load(rows_ptr + rows[:, None] * C + dims[None, :], mask=inside, other=0.0)  # [ROWS, BLOCK_C]
    best = tl.full([ROWS, COLS], -float("inf"), tl.float32)  # of the columns j, j + COLS, j + 2 COLS, ...
    best_start = tl.zeros([ROWS, COLS], tl.int32)
    for start in range(0, V, COLS):
        cols = start + tl.arange(0, COLS)  # [COLS]
        pointers = weight_ptr + cols[None, :] * C + dims[:, None]
        weight = tl.load(pointers, mask=(cols < V)[None, :] & (dims < C)[:, None], other=0.0)  # [BLOCK_C, COLS]
        bias = tl.load(bias_ptr + cols, mask=cols < V, other=-float("inf"))  # past V no logit is the largest
        logits = dot(x, weight) + bias[None, :]  # [ROWS, COLS]
        better = logits > best
        best_start = tl.where(better, start, best_start)
        best = tl.where(better, logits, best)
    cols = best_start + tl.arange(0, COLS)[None, :]  # [ROWS, COLS]
    cols = tl.where(best == tl.max(best, 1)[:, None], cols, V - 1)
    tl.store(ids_ptr + rows, tl.min(cols, 1).to(tl.int64), mask=rows < P)


def linear_argmax(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """rows (P, C), weight (V, C) and bias (V,), all contiguous and fp32 -> int64 (P,)."""
    P, C = rows.shape
    ids = torch.empty(P, dtype=torch.int64, device=rows.device)
    if P:
        config = launch_config("linear_argmax", rows.device, block_of(C))
        grid = (triton.cdiv(P, config["ROWS"]),)
        launch(
            linear_argmax_kernel, grid, rows, weight, bias, ids, P, weight.shape[0], C, BLOCK_C=block_of(C), **config
        )
    return ids
