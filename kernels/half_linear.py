"""Linear layers in half precision whose fp32 weights were cast beforehand, all of a model in one call.

Autocast casts every weight in front of its product and every gradient behind it: ten launches a block on a GPU. Here
the backward pass writes the gradients of the weights in fp32 as they leave the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.backend import select
from beit_fast.kernels.matmul import wide_product
from beit_fast.kernels.registration import fused_op, is_traced


def half_dtype(x: Tensor, weights: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype of autocast where these weights are worth casting beforehand: all in fp32, beside our GPU kernels."""
    device = x.device.type
    if not weights or torch.compiler.is_compiling() or select("linear", x) != "triton":
        return None
    if not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    if dtype.itemsize != 2 or any(
        is_traced(weight) or weight.dtype != torch.float32 or weight.device != x.device for weight in weights
    ):
        return None
    return dtype


@torch.no_grad()
def cast_into(copies: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Copy each weight to the tensor of its shape in `copies`, in one call for all."""
    torch._foreach_copy_(list(copies), [weight.detach() for weight in weights])


def half_linear(
    x: Tensor,
    weight: Tensor,
    half: Tensor,
    half_bias: Tensor | None = None,
    first_bias: Tensor | None = None,
    last_bias: Tensor | None = None,
) -> Tensor:
    """x (..., K) @ half.t() + half_bias, whose gradient goes to the fp32 parameters that were cast.

    Args:
        x: (..., K), made as narrow as `half`.
        weight: (N, K) fp32.
        half: (N, K), `weight` in half precision.
        half_bias: (N,) in half precision, or None.
        first_bias: (n,) fp32, the parameter behind the first n of `half_bias`, or None.
        last_bias: as `first_bias`, behind the last n.

    Returns:
        (..., N) in the dtype of `half`.
    """
    return _half_linear(x.to(half.dtype), weight, half, half_bias, first_bias, last_bias)


def _fake(x: Tensor, weight: Tensor, half: Tensor, *biases: Tensor | None) -> Tensor:
    return half.new_empty(*x.shape[:-1], half.shape[0])


@fused_op("beit_fast::half_linear", fake=_fake)
def _half_linear(
    x: Tensor,
    weight: Tensor,
    half: Tensor,
    half_bias: Tensor | None,
    first_bias: Tensor | None,
    last_bias: Tensor | None,
) -> Tensor:
    return F.linear(x, half, half_bias)


def _backward_fake(grad: Tensor, x: Tensor, half: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes: tuple[Any, ...] = (x.shape, half.shape, half.shape[:1])
    dtypes = (half.dtype, torch.float32, torch.float32)
    made = [x.new_empty(s if need else 0, dtype=d) for s, d, need in zip(shapes, dtypes, needs, strict=True)]
    return made[0], made[1], made[2]


@fused_op("beit_fast::half_linear_backward", fake=_backward_fake)
def _half_linear_backward(grad: Tensor, x: Tensor, half: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, and in fp32 of the weight (N, K) and the bias (N,); empty where `needs` says no."""
    rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    need_x, need_weight, need_bias = needs
    return (
        (rows @ half).view(x.shape) if need_x else half.new_empty(0),
        wide_product(rows.t(), inputs) if need_weight else half.new_empty(0, dtype=torch.float32),
        rows.sum(0, dtype=torch.float32) if need_bias else half.new_empty(0, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, half, half_bias, first, last = inputs
    ctx.first, ctx.last = (0 if bias is None or half_bias is None else bias.shape[0] for bias in (first, last))
    ctx.save_for_backward(x, half)


@_half_linear.backward(_save)
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, half = ctx.saved_tensors
    need_x, need_weight, _, _, need_first, need_last = ctx.needs_input_grad
    need_first, need_last = need_first and ctx.first > 0, need_last and ctx.last > 0
    needs = [need_x, need_weight, need_first or need_last]
    grad_x, grad_weight, sums = _half_linear_backward(grad, x, half, needs)
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        None,
        None,
        sums[: ctx.first] if need_first else None,
        sums[len(sums) - ctx.last :] if need_last else None,
    )
