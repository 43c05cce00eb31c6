"""The nearest of 8,192 codes of 32 dimensions (BEiT v2's tokenizer) for every patch: beit_fast beside plain torch.

pytest benchmarks/bench_linear_argmax.py --benchmark-only
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast.kernels.linear_argmax import linear_argmax
from benchmarks.harness import OURS, Comparison, Disagreement, Implementation
from benchmarks.pointwise import PointwiseCase, compiled, pointwise_cases

NAMES = [OURS, "plain torch", "torch.compile"]
CODE_DIM, PATCHES = 32, 196


def cases(scale: Any) -> dict[str, PointwiseCase]:
    return {name: case for name, case in pointwise_cases(scale, ("",)).items() if not case.backward}


def compare(case: PointwiseCase) -> Comparison:
    generator = torch.Generator().manual_seed(0)
    P = case.batch_size * PATCHES
    rows, codes = (F.normalize(torch.randn(n, CODE_DIM, generator=generator)).to(case.device) for n in (P, case.V))
    bias = torch.zeros(case.V, device=case.device)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight.t()).argmax(1)

    def run(nearest: Callable[[Tensor, Tensor], Tensor]) -> Implementation:
        return Implementation(lambda: nearest(rows, codes), lambda: {"ids": nearest(rows, codes)})

    def disagreement(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, float]:
        """Near-ties may go either way in fp32: by how much the cosines of the chosen codes differ in fp64."""
        ours, theirs = ((rows.double() * codes[result["ids"]].double()).sum(1) for result in (expected, found))
        error = float((ours - theirs).abs().max())
        if error > 1e-6:
            raise Disagreement(f"not the nearest codes: cosines differ by {error:.1e}")
        return {"cosine": error}

    return Comparison(
        group=f"nearest code: P={P}, V={case.V}, C={CODE_DIM}, float32",
        implementations={
            OURS: lambda: run(lambda x, weight: linear_argmax(x, weight, bias)),
            "plain torch": lambda: run(plain),
            "torch.compile": lambda: run(compiled(case, plain)),
        },
        shapes={"P": P, "V": case.V, "C": CODE_DIM}, dtype="float32", compared_by=disagreement,
        flops=2 * P * case.V * CODE_DIM,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_nearest_code(interleaved, case, name):
    interleaved(("linear_argmax", case), lambda: compare(case), name)
