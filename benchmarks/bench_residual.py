"""The residual path, at BEiT-B's width: sum, LayerScale, drop path and LayerNorm; beit_fast beside what there is.

    pytest benchmarks/bench_residual.py --benchmark-only

With the gradients of all inputs, and without any. `plain torch` is the fastest formulation found in PyTorch's own
operations, `official style` the one of the official code. Liger has no residual sum: it takes part with its LayerNorm.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast import kernels
from benchmarks.harness import OURS, Comparison, Implementation
from benchmarks.pointwise import (
    EPS,
    PointwiseCase,
    compiled,
    draws,
    exact_and_eager,
    needs_gpu,
    passes,
    pointwise_cases,
)

NAMES = [OURS, "plain torch", "official style", "torch.compile", "Liger"]


def cases(scale: Any) -> dict[str, PointwiseCase]:
    return pointwise_cases(scale, ("plus", "plain"))


def compare(case: PointwiseCase) -> Comparison:
    draw, (B, N, D) = draws(case), (case.batch_size, case.N, case.D)
    inputs = {"x": draw(B, N, D), "branch": draw(B, N, D, dtype=case.narrow), "weight": draw(D), "bias": draw(D),
              "branch_bias": draw(D)}  # fmt: skip
    drop_path: Tensor | None = None
    if case.kind == "plus":
        inputs["gamma"] = draw(D)
        drop_path = torch.where(torch.arange(B, device=case.device) % 10 == 9, 0.0, 1 / 0.9)
    grads = [draw(B, N, D, gradient=False), draw(B, N, D, dtype=case.narrow, gradient=False)]

    def ours(gamma: Tensor | None = None, *, x: Tensor, branch: Tensor, branch_bias: Tensor, **norm: Tensor) -> Any:
        return kernels.residual_layer_norm(x, branch, gamma, drop_path, norm["weight"], norm["bias"], EPS, branch_bias)

    def residual(x: Tensor, branch: Tensor, branch_bias: Tensor, gamma: Tensor | None) -> Tensor:
        update = branch + branch_bias.to(branch.dtype)
        update = update if gamma is None else gamma * update
        return x + (update if drop_path is None else update * drop_path[:, None, None])

    def official(
        x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor, gamma: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        total = residual(x, branch, branch_bias, gamma)
        return total, F.layer_norm(total, (D,), weight, bias, EPS).to(branch.dtype)

    def plain(
        x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor, gamma: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if gamma is None or drop_path is None:
            total = residual(x, branch, branch_bias, gamma)
        else:
            total = torch.addcmul(x, branch + branch_bias.to(branch.dtype), drop_path[:, None, None] * gamma)
        return total, F.layer_norm(total, (D,), weight, bias, EPS).to(branch.dtype)

    def liger() -> Implementation:
        needs_gpu(case)
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        def forward(
            x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor, gamma: Tensor | None = None
        ) -> Any:
            total = residual(x, branch, branch_bias, gamma)
            return total, LigerLayerNormFunction.apply(total, weight, bias, EPS).to(branch.dtype)

        return passes(case, forward, inputs, grads)

    values, half = B * N * D, 2 if case.narrow != torch.float32 else 4
    return Comparison(
        group=case.title(f"residual and LayerNorm, {case.kind}"),
        implementations={
            OURS: lambda: passes(case, ours, inputs, grads),
            "plain torch": lambda: passes(case, plain, inputs, grads),
            "official style": lambda: passes(case, official, inputs, grads),
            "torch.compile": lambda: passes(case, compiled(case, official), inputs, grads),
            "Liger": liger,
        },
        shapes={"B": B, "N": N, "D": D}, dtype=case.dtype, exact=exact_and_eager(case, official, inputs, grads),
        bytes=(8 + 2 * half) * values + ((12 + 3 * half) * values if case.backward else 0),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_residual(interleaved, case, name):
    interleaved(("residual", case), lambda: compare(case), name)
