# mypy: allow-untyped-defs
"""The Triton kernels around the bias: preparing it, and reducing its gradient over the batch in a fixed order.

A prepared bias is times log2(e), with -inf in the columns that pad the keys (W columns instead of N). The copy that
the backward pass reads is transposed, and for the kernel of `one_pass.py` in fragment order: tiles of ROWS keys, in
them tiles of 16 queries, whose elements lie as the accumulators of the tensor cores hold them. So does for the forward
kernel there the other copy, with queries as rows.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from beit_fast.kernels.launch_table import Config, find_config, launch, launch_config

LOG2E = math.log2(math.e)


def tail_of(num_tokens: int, tile: int) -> int:
    """Width of the tile that takes what full tiles leave: 0, or the least power of two from 16 on that holds it."""
    rest = num_tokens % tile  # may be symbolic under torch.compile: comparisons only
    return 0 if rest == 0 else next(width for width in (16, 32, 64, 128) if rest <= width)


def padded_width(num_tokens: int) -> int:
    """W, the row length of a prepared bias: whole tiles of 64 and their tail. No kernel walks in wider tiles."""
    return num_tokens // 64 * 64 + tail_of(num_tokens, 64)


def one_pass_row(kernel: str, num_tokens: int, device: torch.device) -> Config | None:
    """The launch row of a kernel of `one_pass.py` where the table has it for so many tokens, else None.

    Only a row for exactly this number of tiles of 16 tokens counts: every one takes registers.
    """
    return find_config(kernel, device, (num_tokens + 15) // 16 * 16)


def one_pass_rows(num_tokens: int, device: torch.device) -> tuple[Config | None, Config | None]:
    """Those of the forward and of the backward kernel. The forward one needs the other: two kernels read plain rows."""
    backward = one_pass_row("attention_backward_one_pass", num_tokens, device)
    return None if backward is None else one_pass_row("attention_forward_one_pass", num_tokens, device), backward


def one_pass_columns(num_tokens: int, columns: int) -> tuple[int, int, int]:
    """Number of full tiles of columns, width of one of half a tile or 0, and width of the tail."""
    half = columns // 2 if num_tokens % columns >= columns // 2 else 0
    return num_tokens // columns, half, tail_of(num_tokens % columns - half, columns)


def prepared_dtype(dtype: torch.dtype) -> torch.dtype:
    """Beside bf16 inputs fp16 holds the bias more exactly than they hold themselves; beside fp16 only fp32 does."""
    return torch.float16 if dtype == torch.bfloat16 else torch.float32


@triton.jit
def position_of(element, W, ROWS: tl.constexpr):
    """(row, column) of an element: of rows of W, or with ROWS > 0 of (tiles, W / 16, 16 * ROWS) in fragment order."""
    if ROWS > 0:
        tile, rest = element // (ROWS * W), element % (ROWS * W)
        columns, rest = rest // (16 * ROWS), rest % (16 * ROWS)
        row = tile * ROWS + rest // 256 * 16 + rest // 2 % 2 * 8 + rest // 32 % 8
        column = columns * 16 + rest // 4 % 2 * 8 + rest // 8 % 4 * 2 + rest % 2
    else:
        row, column = element // W, element % W
    return row, column


@triton.jit
def prepare_bias_kernel(
    bias_ptr, copy_ptr, N, W, elements, bias_h, bias_q, bias_k, log2e,
    ROWS_ARE_KEYS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(H, N, N) -> (H, elements): times log2(e), -inf past the last key, 0 past the last query."""
    h = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], as all below
    row, column = position_of(element, W, ROWS)
    if ROWS_ARE_KEYS:
        key, query = row, column
    else:
        key, query = column, row
    offsets = query.to(tl.int64) * bias_q + key.to(tl.int64) * bias_k
    here = (key < N) & (query < N) & (element < elements)
    value = tl.load(bias_ptr + h * bias_h + offsets, mask=here, other=0.0).to(tl.float32) * log2e
    value = tl.where(key < N, value, float("-inf"))
    tl.store(copy_ptr + h * elements + element, value.to(copy_ptr.dtype.element_ty), mask=element < elements)


def padded_shape(num_heads: int, num_tokens: int, row: Config | None) -> tuple[int, ...]:
    """Of the bias that the forward pass reads: (H, N, W), or fragments (H, tiles, columns, 16 * ROWS)."""
    if row is None:
        return num_heads, num_tokens, padded_width(num_tokens)
    count, half, tail = one_pass_columns(num_tokens, row["COLS"])
    columns = (count * row["COLS"] + half + tail) // 16
    return num_heads, triton.cdiv(num_tokens, row["ROWS"]), columns, 16 * row["ROWS"]


def transposed_shape(num_heads: int, num_tokens: int, row: Config | None) -> tuple[int, ...]:
    """Of the bias that the backward pass reads, and of dS: (H, N, W), or fragments (H, tiles, columns, 16 * KEYS)."""
    if row is None:
        return num_heads, num_tokens, padded_width(num_tokens)
    columns = num_tokens // row["QUERIES"] * row["QUERIES"] + tail_of(num_tokens, row["QUERIES"])
    return num_heads, triton.cdiv(num_tokens, row["KEYS"]), columns // 16, 16 * row["KEYS"]


def prepare_bias(
    bias: Tensor, dtype: torch.dtype, transposed: bool, forward_row: Config | None, backward_row: Config | None
) -> tuple[Tensor, Tensor]:
    """(H, N, N) -> of `padded_shape` what the forward, of `transposed_shape` what the backward reads (or empty)."""
    num_heads, num_tokens, _ = bias.shape
    shape = transposed_shape(num_heads, num_tokens, backward_row) if transposed else (0,)
    copies = [
        bias.new_empty(shape, dtype=prepared_dtype(dtype))
        for shape in (padded_shape(num_heads, num_tokens, forward_row), shape)
    ]
    for copy, rows_are_keys in zip(copies, (False, True), strict=True):
        if copy.numel() > 0:
            config, elements, (rows, width) = (
                launch_config("prepare_bias", bias.device),
                copy[0].numel(),
                layout_of(copy),
            )
            launch(
                prepare_bias_kernel, (triton.cdiv(elements, config["BLOCK"]), num_heads), bias, copy, num_tokens,
                width, elements, *bias.stride(), LOG2E, ROWS_ARE_KEYS=rows_are_keys, ROWS=rows, **config,
            )  # fmt: skip
    return copies[0], copies[1]


def layout_of(copy: Tensor) -> tuple[int, int]:
    """ROWS and W, as kernels take them, of a tensor (H, N, W) or (H, tiles, W / 16, 16 * ROWS)."""
    return (0, copy.shape[2]) if copy.dim() == 3 else (copy.shape[3] // 16, copy.shape[2] * 16)


@triton.jit(do_not_specialize=["samples"])
def reduce_bias_gradient_kernel(
    ds_ptr, grad_bias_ptr, samples, N, H, W, elements, ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds dS (samples, H, elements) to (H, N, N) fp32, sample after sample, wherever the samples are cut into chunks.

    The elements are W keys for each query, or with ROWS > 0 in fragment order, with keys as rows.
    """
    h = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK], as all below
    query, key = position_of(element, W, ROWS)
    inside = element < elements
    if ROWS > 0:
        key, query = query, key
        inside = key // 16 * 16 < N  # the rest was not stored
    target = grad_bias_ptr + h * N * N + query * N + key
    store = inside & (key < N) & (query < N)
    total = tl.zeros([BLOCK], tl.float32)
    if ACCUMULATE:
        total += tl.load(target, mask=store, other=0.0)
    stride = tl.cast(elements, tl.int64)
    base = ds_ptr + h * stride
    for _ in range(samples):
        total += tl.load(base + element, mask=inside, other=0.0).to(tl.float32)
        base += H * stride
    tl.store(target, total, mask=store)


def reduce_bias_gradient(ds: Tensor, grad_bias: Tensor, accumulate: bool) -> None:
    """Adds dS over its samples into grad_bias (H, N, N) fp32, which is set unless `accumulate`.

    Args:
        ds: (samples, H, N, W), or (samples, H, tiles, W / 16, 16 * KEYS) in fragment order.
    """
    samples, num_heads, elements = ds.shape[0], ds.shape[1], ds[0, 0].numel()
    config, (rows, width) = launch_config("reduce_bias_gradient", ds.device), layout_of(ds[0])
    launch(
        reduce_bias_gradient_kernel, (triton.cdiv(elements, config["BLOCK"]), num_heads), ds, grad_bias,
        samples, grad_bias.shape[1], num_heads, width, elements, ACCUMULATE=accumulate, ROWS=rows, **config,
    )  # fmt: skip
