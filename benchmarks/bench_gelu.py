"""Bias and exact GELU, at the width of BEiT-B's MLP: beit_fast beside plain torch and torch.compile.

    pytest benchmarks/bench_gelu.py --benchmark-only

With the gradients of both inputs, and without any. Liger has GELU in its tanh form only, which is another function.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast import kernels
from benchmarks.harness import OURS, Comparison
from benchmarks.pointwise import PointwiseCase, compiled, draws, exact_and_eager, passes, pointwise_cases

NAMES = [OURS, "plain torch", "torch.compile"]


def cases(scale: Any) -> dict[str, PointwiseCase]:
    return pointwise_cases(scale, ("",))


def compare(case: PointwiseCase) -> Comparison:
    draw, (B, N, D) = draws(case), (case.batch_size, case.N, 4 * case.D)
    inputs = {"x": draw(B, N, D, dtype=case.narrow), "bias": draw(D)}
    grads = [draw(B, N, D, dtype=case.narrow, gradient=False)]

    def plain(x: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (F.gelu(x + bias.to(x.dtype)),)

    return Comparison(
        group=case.title("bias and exact GELU"),
        implementations={
            OURS: lambda: passes(case, lambda x, bias: (kernels.bias_gelu(x, bias),), inputs, grads),
            "plain torch": lambda: passes(case, plain, inputs, grads),
            "torch.compile": lambda: passes(case, compiled(case, plain), inputs, grads),
        },
        shapes={"B": B, "N": N, "D": D}, dtype=case.dtype, exact=exact_and_eager(case, plain, inputs, grads),
        bytes=(5 if case.backward else 2) * B * N * D * (2 if case.narrow != torch.float32 else 4),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_gelu(interleaved, case, name):
    interleaved(("gelu", case), lambda: compare(case), name)
