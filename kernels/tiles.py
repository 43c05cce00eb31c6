# mypy: allow-untyped-defs
"""What Triton kernels share: products and tiles of (rows, K) matrices, and rounding that is the same everywhere."""

import os

import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 x as `dtype`. Triton's interpreter truncates to bfloat16, so there the rounding is done on the bits."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # not NaN, whose bits the sum could carry over
    return x.to(dtype)


@triton.jit
def dot(a, b, acc=None):
    """acc + a @ b in fp32. Triton's interpreter multiplies the bit patterns of bfloat16: there both are made wide."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_tile(base, rows, stride, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of a (tokens, K) matrix with unit column stride: [ROWS, BLOCK_K], columns past K are 0."""
    dims = tl.arange(0, BLOCK_K)
    pointers = base + rows[:, None] * stride + dims[None, :]
    if BLOCK_K == K:
        return tl.load(pointers)
    return tl.load(pointers, mask=(dims < K)[None, :], other=0.0)


@triton.jit
def store_tile(base, rows, stride, inside, value, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Stores value [ROWS, BLOCK_K] where `inside` [ROWS]; its columns past K are not written."""
    dims = tl.arange(0, BLOCK_K)
    mask = inside[:, None]
    if BLOCK_K != K:
        mask = mask & (dims < K)[None, :]
    tl.store(base + rows[:, None] * stride + dims[None, :], narrow(value, base.dtype.element_ty), mask=mask)


def block_of(head_dim: int) -> int:
    """Head dims are padded, by masks, to a power of two that the tensor cores take."""
    return max(16, triton.next_power_of_2(head_dim))


def readable(tensor: Tensor) -> Tensor:
    """The tensor itself if the kernels can read it: unit stride in the last dimension, offsets of tokens in int32."""
    fits = tensor.stride(3) == 1 and tensor.stride(1) * tensor.shape[1] < 2**31
    return tensor if fits else tensor.contiguous()


def strides_of(*tensors: Tensor) -> list[int]:
    """Strides of batch, tokens and heads of tensors (B, N, H, K)."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
