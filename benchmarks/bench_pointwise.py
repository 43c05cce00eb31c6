"""What lies between the matrix products, at BEiT-B's width: residual path, GELU, loss of masked image modelling.

    pytest benchmarks/bench_pointwise.py --benchmark-only

Each with its gradients, and without any; outputs and gradients are compared before anything is timed. `plain torch` is
the fastest formulation found in PyTorch's own operations, `official style` the one of the official code. Liger's
kernels need a GPU, and it has neither the residual sum nor the exact GELU: it takes part with its LayerNorm and loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit_fast import kernels
from benchmarks.harness import OURS, Absent, Comparison, Rival

EPS = 1e-6
RIVALS = [OURS, "plain torch", "official style", "torch.compile", "Liger"]
LOSS_RIVALS = [OURS, "plain torch", "transformers style", "torch.compile", "Liger"]


@dataclass(frozen=True)
class Case:
    op: str
    batch_size: int
    backward: bool
    dtype: str
    device: torch.device
    N: int = 197
    D: int = 768
    V: int = 8192
    masked: int = 75
    preset: str = "plus"

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.dtype == "float32" else 3e-2


def cases(scale: Any) -> dict[str, Case]:
    batches = scale.pick(
        tiny=(2,), cpu=(8,), gpu=(256,), full=(64, 128, 256) if scale.device.type == "cuda" else (8, 32)
    )
    sizes = {"N": 5, "D": 48, "V": 40, "masked": 2} if scale.name == "tiny" else {}
    kinds = [("residual", "plus"), ("residual", "plain"), ("gelu", "plus"), ("loss", "plus")]
    return {
        f"{op}{'-' + preset if op == 'residual' else ''}-B={batch}-{'training' if backward else 'inference'}": Case(
            op, batch, backward, scale.dtype, scale.device, preset=preset, **sizes
        )
        for op, preset in kinds
        for batch in batches
        for backward in (True, False)
    }


def passes(
    case: Case, forward: Callable[..., Sequence[Tensor]], inputs: dict[str, Tensor], probes: list[Tensor]
) -> Rival:
    """Forward, and with `case.backward` the gradients of all inputs that have one, as a network would ask for them."""
    learned = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}

    def run() -> dict[str, Tensor]:
        with torch.set_grad_enabled(case.backward):
            outputs = list(forward(**inputs))
        found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        if case.backward:
            wanted = [(o, p.to(o.dtype)) for o, p in zip(outputs, probes, strict=False) if o.requires_grad]
            gradients = torch.autograd.grad([o for o, _ in wanted], list(learned.values()), [p for _, p in wanted])
            found |= {f"gradient of {name}": g for name, g in zip(learned, gradients, strict=True)}
        return found

    return Rival(run, run)


def draws(case: Case) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32, gradient: bool = True) -> Tensor:
        tensor = torch.randn(shape, generator=generator).to(case.device, dtype)
        return tensor.requires_grad_(gradient and case.backward)

    return draw


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function torch.compile has made; it is compiled at its first call, before the clock starts."""
    torch._dynamo.reset()
    return torch.compile(forward, fullgraph=True, dynamic=False)


def needs_gpu(case: Case) -> None:
    if case.device.type != "cuda":
        raise Absent("Liger's kernels are Triton programs: they need a GPU")


# The residual path


def residual(case: Case) -> Comparison:
    draw, (B, N, D) = draws(case), (case.batch_size, case.N, case.D)
    narrow = getattr(torch, case.dtype)
    inputs = {
        "x": draw(B, N, D),
        "branch": draw(B, N, D, dtype=narrow),
        "weight": draw(D),
        "bias": draw(D),
        "branch_bias": draw(D),
    }
    drop_path: Tensor | None = None
    if case.preset == "plus":
        inputs["gamma"] = draw(D)
        drop_path = torch.where(torch.arange(B, device=case.device) % 10 == 9, 0.0, 1 / 0.9)
    probes = [draw(B, N, D, gradient=False), draw(B, N, D, dtype=narrow, gradient=False)]

    def ours(
        x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor, gamma: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return kernels.residual_layer_norm(x, branch, gamma, drop_path, weight, bias, EPS, branch_bias)

    def official(
        x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor, gamma: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        update = branch + branch_bias.to(branch.dtype)
        if gamma is not None:
            update = gamma * update
        if drop_path is not None:
            update = update * drop_path[:, None, None]
        total = x + update
        return total, F.layer_norm(total, (D,), weight, bias, EPS).to(branch.dtype)

    def plain(
        x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor, gamma: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if gamma is None and drop_path is None:
            total = x + (branch + branch_bias.to(branch.dtype))
        else:
            scale = gamma if drop_path is None else drop_path[:, None, None] * gamma
            total = torch.addcmul(x, branch + branch_bias.to(branch.dtype), scale)  # type: ignore[arg-type]
        return total, F.layer_norm(total, (D,), weight, bias, EPS).to(branch.dtype)

    def liger() -> Rival:
        needs_gpu(case)
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        def forward(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, branch_bias: Tensor, **more: Any) -> Any:
            update = branch + branch_bias.to(branch.dtype)
            update = more["gamma"] * update if more else update
            total = x + (update if drop_path is None else update * drop_path[:, None, None])
            return total, LigerLayerNormFunction.apply(total, weight, bias, EPS).to(branch.dtype)

        return passes(case, forward, inputs, probes)

    u, half = B * N * D, 2 if narrow != torch.float32 else 4
    traffic = (8 + 2 * half) * u + ((12 + 3 * half) * u if case.backward else 0)
    return Comparison(
        group=title(case, "residual and LayerNorm, " + case.preset),
        rivals={
            OURS: lambda: passes(case, ours, inputs, probes),
            "plain torch": lambda: passes(case, plain, inputs, probes),
            "official style": lambda: passes(case, official, inputs, probes),
            "torch.compile": lambda: passes(case, compiled(official), inputs, probes),
            "Liger": liger,
        },
        shapes={"B": B, "N": N, "D": D},
        dtype=case.dtype,
        bytes=traffic,
        tolerance=case.tolerance,
    )


# GELU


def gelu(case: Case) -> Comparison:
    draw, (B, N, D) = draws(case), (case.batch_size, case.N, 4 * case.D)
    narrow = getattr(torch, case.dtype)
    inputs = {"x": draw(B, N, D, dtype=narrow), "bias": draw(D)}
    probes = [draw(B, N, D, dtype=narrow, gradient=False)]

    def official(x: Tensor, bias: Tensor) -> tuple[Tensor]:
        return (F.gelu(x + bias.to(x.dtype)),)

    def liger() -> Rival:
        raise Absent("Liger has GELU in its tanh form only, which is another function")

    values = B * N * D * (2 if narrow != torch.float32 else 4)
    return Comparison(
        group=title(case, "bias and exact GELU"),
        rivals={
            OURS: lambda: passes(case, lambda x, bias: (kernels.bias_gelu(x, bias),), inputs, probes),
            "plain torch": lambda: passes(case, official, inputs, probes),
            "torch.compile": lambda: passes(case, compiled(official), inputs, probes),
            "Liger": liger,
        },
        shapes={"B": B, "N": N, "D": D},
        dtype=case.dtype,
        bytes=(5 if case.backward else 2) * values,
        tolerance=case.tolerance,
    )


# The loss


def loss(case: Case) -> Comparison:
    draw, (B, N, D, V) = draws(case), (case.batch_size, case.N, case.D, case.V)
    narrow = getattr(torch, case.dtype)
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
    probes = [torch.ones((), device=case.device)]

    def autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(**given: Tensor) -> Any:
            with torch.autocast(case.device.type, dtype=narrow, enabled=narrow != torch.float32):
                return forward(**given)

        return run

    def ours(**given: Any) -> Any:
        return kernels.masked_cross_entropy(**given, rows=rows, targets=targets, eps=EPS)

    def scored(logits: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(logits.float(), targets), (logits.argmax(-1) == targets).sum()

    def plain(
        hidden: Tensor, norm_weight: Tensor, norm_bias: Tensor, head_weight: Tensor, head_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        normed = F.layer_norm(hidden.index_select(0, rows), (D,), norm_weight, norm_bias, EPS)
        return scored(F.linear(normed, head_weight, head_bias))

    def transformers_style(
        hidden: Tensor, norm_weight: Tensor, norm_bias: Tensor, head_weight: Tensor, head_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        normed = F.layer_norm(hidden.view(B, N, D), (D,), norm_weight, norm_bias, EPS)
        return scored(F.linear(normed[:, 1:], head_weight, head_bias)[mask])

    def liger() -> Rival:
        needs_gpu(case)
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        def forward(
            hidden: Tensor, norm_weight: Tensor, norm_bias: Tensor, head_weight: Tensor, head_bias: Tensor
        ) -> Any:
            normed = F.layer_norm(hidden.index_select(0, rows), (D,), norm_weight, norm_bias, EPS).to(narrow)
            found = LigerFusedLinearCrossEntropyFunction.apply(
                normed, head_weight.to(narrow), targets, head_bias.to(narrow)
            )
            return (found[0],)

        rival = passes(case, forward, inputs, probes)
        return Rival(rival.run, None, info={"note": "without the accuracy, so its outputs are not compared"})

    return Comparison(
        group=title(case, f"loss of masked image modelling, {M} of {B * N} rows, V={V}"),
        rivals={
            OURS: lambda: passes(case, autocast(ours), inputs, probes),
            "plain torch": lambda: passes(case, autocast(plain), inputs, probes),
            "transformers style": lambda: passes(case, autocast(transformers_style), inputs, probes),
            "torch.compile": lambda: passes(case, autocast(compiled(plain)), inputs, probes),
            "Liger": liger,
        },
        shapes={"B": B, "N": N, "D": D, "V": V, "M": M},
        dtype=case.dtype,
        flops=(3 if case.backward else 1) * 2.0 * M * V * D,
        tolerance=case.tolerance,
    )


def title(case: Case, what: str) -> str:
    direction = "forward and backward" if case.backward else "forward"
    return f"{what}, {direction}: D={case.D}, N={case.N}, B={case.batch_size}, {case.dtype}"


COMPARISONS = {"residual": residual, "gelu": gelu, "loss": loss}


@pytest.mark.parametrize("rival", list(dict.fromkeys(RIVALS + LOSS_RIVALS)))
def test_pointwise(in_turns, case, rival):
    in_turns(case, lambda: COMPARISONS[case.op](case), rival)
