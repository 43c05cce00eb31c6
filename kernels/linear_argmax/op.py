"""The operation `linear_argmax`; it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from beit_fast.kernels.backend import select
from beit_fast.kernels.linear_argmax import cpu, reference
from beit_fast.kernels.registration import fused_op

MAX_WIDTH = 128
"""C up to which the Triton kernel keeps whole rows in registers; wider products are for cuBLAS."""


def linear_argmax(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The arg-max of rows @ weight.T + bias, computed in the weight's dtype; of equal logits the first.

    With codes e_v of unit length as the weight it is the nearest code of every row, and with the bias -|e_v|^2 / 2
    for codes of any length.

    Args:
        rows: (P, C), floating point.
        weight: (V, C).
        bias: (V,), of the weight's dtype.

    Returns:
        int64 (P,).

    Raises:
        ValueError: the shapes do not fit, or V is 0.
    """
    if rows.ndim != 2 or weight.ndim != 2 or rows.shape[1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"rows must be (P, C), weight (V, C) and bias (V,), got {tuple(rows.shape)}, {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}"
        )
    if not len(weight):
        raise ValueError("weight must have at least one row: there is no largest of no logits")
    backend = select("linear_argmax", rows, weight.dtype)
    if backend == "reference":
        return reference.linear_argmax(rows, weight, bias)
    if backend == "triton" and (weight.dtype != torch.float32 or weight.shape[1] > MAX_WIDTH):
        backend = "torch"
    return _linear_argmax(rows, weight, bias, backend)


def _fake(rows: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return rows.new_empty(rows.shape[0], dtype=torch.int64)


@fused_op("beit_fast::linear_argmax", fake=_fake)
def _linear_argmax(rows: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    rows = rows.to(weight.dtype)
    if backend == "triton":
        from beit_fast.kernels.linear_argmax import kernel

        return kernel.linear_argmax(rows.contiguous(), weight.contiguous(), bias.contiguous())
    return cpu.linear_argmax(rows, weight, bias)
