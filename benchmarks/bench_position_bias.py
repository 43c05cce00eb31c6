"""The relative position bias: a table spread over all pairs of tokens, and the gradient of the bias folded back.

    pytest benchmarks/bench_position_bias.py --benchmark-only

Every gradient is asked of autograd, as a network does. `index_put_` is what PyTorch makes of indexing the table, as
timm and transformers do; the two `index_add_` are gradients written by hand, heads first or rows first in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from beit_fast import kernels
from benchmarks.harness import OURS, Comparison, Implementation

NAMES = [OURS, "index_add_, heads first", "index_add_, rows first", "index_put_", "index", "index_select"]


@dataclass(frozen=True)
class Case:
    window: tuple[int, int]
    gradient: bool
    device: torch.device
    num_heads: int = 12


def cases(scale: Any) -> dict[str, Case]:
    sides = scale.pick(tiny=(2,), cpu=(14,), gpu=(14, 24), full=(14, 24, 32))
    return {
        f"{side}x{side}-{'gradient' if gradient else 'bias'}": Case((side, side), gradient, scale.device)
        for side in sides
        for gradient in (True, False)
    }


def gradient_by(fold: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`spread` with `fold` for its gradient."""

    class Bias(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, table: Tensor) -> Tensor:
            return spread(table)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return fold(grad)

    return Bias.apply


def compare(case: Case) -> Comparison:
    window, H = case.window, case.num_heads
    index = kernels.relative_position_index(window).to(case.device).view(-1)
    N, rows = window[0] * window[1] + 1, int(index.max()) + 1
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(rows, H, generator=generator).to(case.device).requires_grad_(case.gradient)
    grad = torch.randn(H, N, N, generator=generator).to(case.device)

    def ours(t: Tensor) -> Tensor:
        return kernels.relative_position_bias(t, window)

    def indexed(t: Tensor) -> Tensor:
        return t[index].view(N, N, H).permute(2, 0, 1).contiguous()

    def selected(t: Tensor) -> Tensor:
        return t.t().contiguous().index_select(1, index).view(H, N, N)

    def heads_first(g: Tensor) -> Tensor:
        return g.new_zeros(H, rows).index_add_(1, index, g.reshape(H, -1)).t().contiguous()

    def rows_first(g: Tensor) -> Tensor:
        return g.new_zeros(rows, H).index_add_(0, index, g.permute(1, 2, 0).reshape(-1, H))

    def gradient(make: Callable[[Tensor], Tensor]) -> Implementation:
        bias = make(table)

        def run() -> Tensor:
            return torch.autograd.grad(bias, table, grad, retain_graph=True)[0]

        return Implementation(run, lambda: {"table gradient": run()})

    def forward(make: Callable[[Tensor], Tensor]) -> Implementation:
        return Implementation(lambda: make(table), lambda: {"bias": make(table)})

    if case.gradient:
        ways = {
            OURS: lambda: gradient(ours),
            "index_add_, heads first": lambda: gradient(gradient_by(heads_first, selected)),
            "index_add_, rows first": lambda: gradient(gradient_by(rows_first, selected)),
            "index_put_": lambda: gradient(indexed),
        }
    else:
        ways = {
            OURS: lambda: forward(ours),
            "index": lambda: forward(indexed),
            "index_select": lambda: forward(selected),
        }
    return Comparison(
        group=f"{'gradient of the position table' if case.gradient else 'position bias'}: "
        f"window {window[0]} x {window[1]}, H={H}, float32",
        implementations=ways,
        shapes={"N": N, "H": H},
        bytes=4.0 * (grad.numel() + table.numel()),
        tolerance=1e-5,
    )


@pytest.mark.parametrize("name", NAMES)
def test_position_bias(interleaved, case, name):
    interleaved(case, lambda: compare(case), name)
