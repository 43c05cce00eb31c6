# mypy: allow-untyped-defs
"""Triton kernels of a convolutional encoder: bias and ReLU, the same after a 2 x 2 pool, the convolution of pixels as a
gathered matrix product, and the arg-max that computes near-ties again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.launch_table import launch, launch_config
from beit_fast.kernels.tiles import dot, narrow


@triton.jit
def bias_relu_kernel(x_ptr, bias_ptr, y_ptr, R, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)  # [COLS]
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    offsets = rows[:, None] * C + cols[None, :]
    y = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLS]
    y = tl.maximum(y + tl.load(bias_ptr + cols, mask=cols < C, other=0.0)[None, :], 0.0)
    tl.store(y_ptr + offsets, narrow(y, y_ptr.dtype.element_ty), mask=inside)


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """x (..., C) contiguous, bias (C,) fp32 -> (..., C)."""
    C = x.shape[-1]
    y = torch.empty_like(x)
    if x.numel():
        config = launch_config("bias_relu", x.device)
        R = x.numel() // C
        grid = (triton.cdiv(R, config["ROWS"]), triton.cdiv(C, config["COLS"]))
        launch(bias_relu_kernel, grid, x, bias, y, R, C, **config)
    return y


@triton.jit
def pool_bias_relu_kernel(
    x_ptr, bias_ptr, y_ptr, relu_ptr, R, W, C, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    # R pixels of the pooled image, W of them in a line; of x, lines 2 i and 2 i + 1 have 2 W pixels each
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)  # [COLS]
    inside = (rows < R)[:, None] & (cols < C)[None, :]
    corner = ((rows // W) * 4 * W + (rows % W) * 2)[:, None] * C + cols[None, :]  # upper left of four pixels
    below = corner + 2 * W * C
    y = tl.load(x_ptr + corner, mask=inside, other=0.0).to(tl.float32)  # [ROWS, COLS]
    y = tl.maximum(y, tl.load(x_ptr + corner + C, mask=inside, other=0.0).to(tl.float32))
    y = tl.maximum(y, tl.load(x_ptr + below, mask=inside, other=0.0).to(tl.float32))
    y = tl.maximum(y, tl.load(x_ptr + below + C, mask=inside, other=0.0).to(tl.float32))
    y += tl.load(bias_ptr + cols, mask=cols < C, other=0.0)[None, :]
    offsets = rows[:, None] * C + cols[None, :]
    tl.store(y_ptr + offsets, narrow(y, y_ptr.dtype.element_ty), mask=inside)
    tl.store(relu_ptr + offsets, narrow(tl.maximum(y, 0.0), relu_ptr.dtype.element_ty), mask=inside)


def pool_bias_relu(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, H, W, C) contiguous, H and W even, bias (C,) fp32 -> (B, H/2, W/2, C), twice."""
    B, H, W, C = x.shape
    y, relu = (x.new_empty(B, H // 2, W // 2, C) for _ in range(2))
    if y.numel():
        config = launch_config("pool_bias_relu", x.device)
        R = y.numel() // C
        grid = (triton.cdiv(R, config["ROWS"]), triton.cdiv(C, config["COLS"]))
        launch(pool_bias_relu_kernel, grid, x, bias, y, relu, R, W // 2, C, **config)
    return y, relu


@triton.jit
def pixel_conv_kernel(
    images_ptr, weight_ptr, bias_ptr, y_ptr, relu_ptr, R, H, W, N, scale, shift,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # A row is a pixel of the result, a tap one of the CHANNELS * SIZE * SIZE pixels that enter it, padded to TAPS.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)  # [COLS]
    image = images_ptr + (rows // (H * W)) * (CHANNELS * H * W)
    pixel = (rows % (H * W)).to(tl.int32)
    line, column = pixel // W, pixel % W
    y = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, TAPS, BLOCK_K):
        taps = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
        channel = taps // (SIZE * SIZE)
        from_line = line[:, None] + (taps % (SIZE * SIZE) // SIZE - SIZE // 2)[None, :]  # [ROWS, BLOCK_K]
        from_column = column[:, None] + (taps % SIZE - SIZE // 2)[None, :]
        inside = (rows < R)[:, None] & (channel < CHANNELS)[None, :]
        inside = inside & (from_line >= 0) & (from_line < H) & (from_column >= 0) & (from_column < W)
        pointers = image[:, None] + (channel[None, :] * H + from_line) * W + from_column
        pixels = tl.load(pointers, mask=inside, other=0.0) * scale + shift
        pixels = narrow(tl.where(inside, pixels, 0.0), weight_ptr.dtype.element_ty)  # the border is 0, not `shift`
        weight = tl.load(weight_ptr + taps[:, None] + cols[None, :] * TAPS, mask=(cols < N)[None, :], other=0.0)
        y += dot(pixels, weight)
    y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0)[None, :]
    offsets = rows[:, None] * N + cols[None, :]
    stored = (rows < R)[:, None] & (cols < N)[None, :]
    tl.store(y_ptr + offsets, narrow(y, y_ptr.dtype.element_ty), mask=stored)
    tl.store(relu_ptr + offsets, narrow(tl.maximum(y, 0.0), relu_ptr.dtype.element_ty), mask=stored)


def pixel_conv(images: Tensor, weight: Tensor, bias: Tensor, scale: float, shift: float) -> tuple[Tensor, Tensor]:
    """images (B, C, H, W) contiguous fp32, weight (N, C, k, k), bias (N,) fp32 -> (B, H, W, N), twice."""
    B, C, H, W = images.shape
    N, _, size, _ = weight.shape
    y, relu = (weight.new_empty(B, H, W, N) for _ in range(2))
    if y.numel():
        config = dict(launch_config("pixel_conv", images.device))
        taps = triton.cdiv(C * size * size, config["BLOCK_K"]) * config["BLOCK_K"]
        matrix = weight.new_zeros(N, taps)
        matrix[:, : C * size * size] = weight.reshape(N, -1)
        grid = (triton.cdiv(B * H * W, config["ROWS"]), triton.cdiv(N, config["COLS"]))
        launch(
            pixel_conv_kernel, grid, images, matrix, bias, y, relu, B * H * W, H, W, N, scale, shift,
            CHANNELS=C, SIZE=size, TAPS=taps, **config,
        )  # fmt: skip
    return y, relu


@triton.jit
def exact_argmax_kernel(
    logits_ptr, rows_ptr, weight_ptr, bias_ptr, ids_ptr, V, C, slack, sum_error,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One row a program. Its largest logit, then every column within twice the error bound of it again in fp64.
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_C)  # [BLOCK_C]
    x = tl.load(rows_ptr + row * C + dims, mask=dims < C, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x))
    x = x.to(tl.float64)
    largest = -float("inf")
    magnitude = 0.0
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)  # [BLOCK]
        logits = tl.load(logits_ptr + row * V + cols, mask=cols < V, other=0.0)
        logits += tl.load(bias_ptr + cols, mask=cols < V, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.where(cols < V, logits, -float("inf"))))
        magnitude = tl.maximum(magnitude, tl.max(tl.abs(logits)))
    threshold = largest - 2.0 * (norm * slack * 1.001 + magnitude * sum_error)
    best = tl.full([], -float("inf"), tl.float64)
    best_col = tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + row * V + cols, mask=cols < V, other=0.0)
        logits += tl.load(bias_ptr + cols, mask=cols < V, other=0.0)
        open_cols = tl.where((cols < V) & (logits < threshold), V, cols)  # a logit that is not a number stays open
        col = tl.min(open_cols)
        while col < V:
            weight = tl.load(weight_ptr + col.to(tl.int64) * C + dims, mask=dims < C, other=0.0).to(tl.float64)
            value = tl.sum(x * weight) + tl.load(bias_ptr + col).to(tl.float64)
            best_col = tl.where(value > best, col, best_col)
            best = tl.maximum(value, best)
            open_cols = tl.where(open_cols > col, open_cols, V)
            col = tl.min(open_cols)
    tl.store(ids_ptr + row, best_col.to(tl.int64))


def exact_argmax(
    logits: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, slack: float, sum_error: float
) -> Tensor:  # fmt: skip
    """logits (P, V) fp32 and rows (P, C), both contiguous, weight (V, C) and bias (V,) fp32 -> int64 (P,)."""
    P, V = logits.shape
    ids = torch.empty(P, dtype=torch.int64, device=logits.device)
    if P:
        block = triton.next_power_of_2(rows.shape[1])
        config = launch_config("exact_argmax", logits.device)
        launch(
            exact_argmax_kernel, (P,), logits, rows, weight, bias, ids, V, rows.shape[1], slack, sum_error,
            BLOCK_C=block, **config,
        )  # fmt: skip
    return ids
