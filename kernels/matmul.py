"""Matrix products in fp32 on a CPU, by the faster of the two libraries that torch brings along.

torch hands them to MKL, which has no AVX-512 path for processors that are not Intel's; oneDNN asks what the processor
can do. On two Zen 4 cores oneDNN makes 190 GFLOP/s of a product of BEiT-B where MKL makes 145. Everywhere else (a GPU,
half precision, a traced graph, Intel's processors) `linear` is `torch.nn.functional.linear` and `matmul` is `@`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.backend import onednn_is_faster, select
from beit_fast.kernels.registration import is_traced

_PIECE = 128  # rows whose sum is rounded as it grows; the sums of the pieces are added pairwise
_FEW_MULTIPLY_ADDS = 1 << 25  # below, what a call of oneDNN costs beside its arithmetic eats up the gain


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,) or None -> (..., N), as `torch.nn.functional.linear`."""
    if torch.compiler.is_compiling() or not onednn_is_faster() or not _onednn_serves(x, weight, weight.shape[0]):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _onednn(x, weight, bias)


def matmul(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left (M, K) @ right (K, N) + bias (N,) or None -> (M, N), without a gradient; for use within an op."""
    if not torch.compiler.is_compiling() and onednn_is_faster() and _onednn_serves(left, right, right.shape[1]):
        return _onednn(left, right.t(), bias)
    return left @ right if bias is None else torch.addmm(bias, left, right)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left (M, K) @ right (K, N), of half precision, in fp32 and never rounded to less; within an op."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # on a CPU torch has no such product


def column_sums(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum of rows (R, D), each times its weight (R,), as (D,): faster than torch's sum, and as exact.

    By products with pieces of the rows: in one product the rounding would grow with R.
    """
    weights = rows.new_ones(rows.shape[0]) if weights is None else weights
    whole = rows.shape[0] // _PIECE * _PIECE
    pieces = weights[:whole].view(-1, 1, _PIECE) @ rows[:whole].view(-1, _PIECE, rows.shape[1])  # (R / 128, 1, D)
    return pieces.sum((0, 1)) + weights[whole:] @ rows[whole:]


def _onednn_serves(x: Tensor, weight: Tensor, columns: int) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not is_traced(x)
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
        and x.numel() * columns >= _FEW_MULTIPLY_ADDS
        and select("linear", x) != "reference"
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) @ weight.t() + bias; a weight that is itself a transposed view is read as it lies."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        # a second derivative is asked for where gradients are recorded here: by torch's own products
        product = torch.mm if torch.is_grad_enabled() else matmul
        return (
            product(rows, weight).view(x.shape) if need_x else None,
            product(rows.t(), inputs) if need_weight else None,
            column_sums(rows) if need_bias else None,
        )
