"""The loss of masked image modelling, at BEiT-B's width: final norm, head and cross-entropy of the masked rows.

    pytest benchmarks/bench_mim_loss.py --benchmark-only

With the gradients of all inputs, and without any. `plain torch` chooses the masked rows first, `transformers style`
last. Liger's loss does not give the accuracy, so its outputs are not compared.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast import kernels
from benchmarks.harness import OURS, Comparison, Implementation
from benchmarks.models import autocast
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

NAMES = [OURS, "plain torch", "transformers style", "torch.compile", "Liger"]


def cases(scale: Any) -> dict[str, PointwiseCase]:
    return pointwise_cases(scale, ("",))


def compare(case: PointwiseCase) -> Comparison:
    draw, (B, N, D, V) = draws(case), (case.batch_size, case.N, case.D, case.V)
    generator = torch.Generator().manual_seed(1)
    mask = torch.stack([torch.randperm(N - 1, generator=generator) < case.masked for _ in range(B)]).to(case.device)
    patches = torch.arange(B, device=case.device)[:, None] * N + 1 + torch.arange(N - 1, device=case.device)
    rows, M = patches[mask], B * case.masked
    targets = torch.randint(0, V, (M,), generator=generator).to(case.device)
    inputs = {
        "hidden": draw(B * N, D),
        "norm_weight": draw(D),
        "norm_bias": draw(D),
        "head_weight": (draw(V, D).detach() * 0.02).requires_grad_(case.backward),
        "head_bias": draw(V),
    }
    grads = [torch.ones((), device=case.device)]

    def mixed(forward: Callable[..., Any]) -> Implementation:
        def run(**given: Tensor) -> Any:
            with autocast(case.device, case.narrow):
                return forward(**given)

        return passes(case, run, inputs, grads)

    def ours(**given: Any) -> Any:
        return kernels.masked_cross_entropy(**given, rows=rows, targets=targets, eps=EPS)

    def scored(logits: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets), (
            logits.argmax(-1) == targets
        ).sum()

    def plain(hidden: Tensor, norm_weight: Tensor, norm_bias: Tensor, head_weight: Tensor, head_bias: Tensor) -> Any:
        normed = F.layer_norm(hidden.index_select(0, rows), (D,), norm_weight, norm_bias, EPS)
        return scored(F.linear(normed, head_weight, head_bias))

    def transformers_style(
        hidden: Tensor, norm_weight: Tensor, norm_bias: Tensor, head_weight: Tensor, head_bias: Tensor
    ) -> Any:
        normed = F.layer_norm(hidden.view(B, N, D), (D,), norm_weight, norm_bias, EPS)
        return scored(F.linear(normed[:, 1:], head_weight, head_bias)[mask])

    def liger() -> Implementation:
        needs_gpu(case)
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        def run(hidden: Tensor, norm_weight: Tensor, norm_bias: Tensor, head_weight: Tensor, head_bias: Tensor) -> Any:
            normed = F.layer_norm(hidden.index_select(0, rows), (D,), norm_weight, norm_bias, EPS).to(case.narrow)
            return Liger.apply(normed, head_weight.to(case.narrow), targets, head_bias.to(case.narrow))[:1]

        return Implementation(passes(case, run, inputs, grads).run, info={"note": "without the accuracy"})

    return Comparison(
        group=case.title(f"loss of masked image modelling, {M} of {B * N} rows, V={V}"),
        implementations={
            OURS: lambda: mixed(ours),
            "plain torch": lambda: mixed(plain),
            "transformers style": lambda: mixed(transformers_style),
            "torch.compile": lambda: mixed(compiled(case, plain)),
            "Liger": liger,
        },
        shapes={"B": B, "N": N, "D": D, "V": V, "M": M}, dtype=case.dtype,
        exact=exact_and_eager(case, plain, inputs, grads, lambda: autocast(case.device, case.narrow)),
        flops=(3 if case.backward else 1) * 2.0 * M * V * D,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_mim_loss(interleaved, case, name):
    interleaved(("loss", case), lambda: compare(case), name)
