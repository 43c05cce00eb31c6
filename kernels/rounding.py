# mypy: allow-untyped-defs
"""Conversion to a narrower float inside a kernel, rounded to nearest even on a GPU and in the interpreter alike."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 x as `dtype`. Triton's interpreter truncates to bfloat16, so there the rounding is done on the bits."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
