# mypy: allow-untyped-defs
"""Triton kernels of `bias_gelu`: one pass forward, one pass backward that also reduces the bias gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.launch_table import launch, launch_config
from beit_fast.kernels.tiles import narrow


@triton.jit
def bias_gelu_kernel(x_ptr, bias_ptr, y_ptr, R, D, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)  # [COLS]
    inside = (rows < R)[:, None] & (cols < D)[None, :]
    offsets = rows[:, None] * D + cols[None, :]
    t = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLS]
    if HAS_BIAS:
        t += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    y = 0.5 * t * (1.0 + tl.erf(t * 0.7071067811865476))
    tl.store(y_ptr + offsets, narrow(y, y_ptr.dtype.element_ty), mask=inside)


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., D) contiguous, bias (D,) or None -> (..., D)."""
    D = x.shape[-1]
    R = x.numel() // max(D, 1)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    config = launch_config("gelu_forward", x.device)
    grid = (triton.cdiv(R, config["ROWS"]), triton.cdiv(D, config["COLS"]))
    launch(bias_gelu_kernel, grid, x, x if bias is None else bias, y, R, D, HAS_BIAS=bias is not None, **config)
    return y


@triton.jit
def bias_gelu_backward_kernel(
    grad_ptr, x_ptr, bias_ptr, grad_x_ptr, partial_ptr, R, D,
    HAS_BIAS: tl.constexpr, NEED_BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # Program (p, j) takes the row tiles p, p + P, ... of the columns j: a fixed order, so the sums repeat bit for bit.
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)  # [COLS]
    stride = tl.num_programs(0)
    bias = tl.zeros([COLS], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), stride):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
        inside = (rows < R)[:, None] & (cols < D)[None, :]
        offsets = rows[:, None] * D + cols[None, :]
        t = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + bias[None, :]  # [ROWS, COLS]
        grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLS]
        phi = 0.3989422804014327 * tl.exp(-0.5 * t * t)
        grad *= 0.5 * (1.0 + tl.erf(t * 0.7071067811865476)) + t * phi
        tl.store(grad_x_ptr + offsets, narrow(grad, grad_x_ptr.dtype.element_ty), mask=inside)
        if NEED_BIAS:
            total += grad
    if NEED_BIAS:
        row = tl.program_id(0).to(tl.int64) * D
        tl.store(partial_ptr + row + cols, tl.sum(total, 0), mask=cols < D)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, need_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x (..., D) and of bias (D,) fp32, the latter empty unless `need_bias`; grad and x contiguous."""
    D = x.shape[-1]
    R = x.numel() // max(D, 1)
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, x.new_zeros(D if need_bias else 0, dtype=torch.float32)
    config = dict(launch_config("gelu_backward", x.device))
    programs = config.pop("PROGRAMS")
    tiles = triton.cdiv(R, config["ROWS"])
    grid = (min(programs, tiles) if need_bias else tiles, triton.cdiv(D, config["COLS"]))
    partial = x.new_empty((grid[0], D) if need_bias else 0, dtype=torch.float32)
    launch(
        bias_gelu_backward_kernel, grid, grad, x, x if bias is None else bias, grad_x, partial, R, D,
        HAS_BIAS=bias is not None, NEED_BIAS=need_bias, **config,
    )  # fmt: skip
    return grad_x, partial.sum(0) if need_bias else partial
