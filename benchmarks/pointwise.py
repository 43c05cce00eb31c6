"""What the benchmarks of single operations share: cases, inputs, and a forward and backward pass over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Implementation, Unavailable

EPS = 1e-6


@dataclass(frozen=True)
class PointwiseCase:
    """B images of N tokens of width D; `backward` with the gradients of all inputs that have one."""

    kind: str
    batch_size: int
    backward: bool
    dtype: str
    device: torch.device
    compiled: bool = True
    """Whether torch.compile takes part: it needs minutes on a CPU."""
    N: int = 197
    D: int = 768
    V: int = 8192
    masked: int = 75

    @property
    def narrow(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def title(self, what: str) -> str:
        direction = "forward and backward" if self.backward else "forward"
        return f"{what}, {direction}: D={self.D}, N={self.N}, B={self.batch_size}, {self.dtype}"


def pointwise_cases(scale: Any, kinds: Sequence[str]) -> dict[str, PointwiseCase]:
    full = (64, 128, 256) if scale.device.type == "cuda" else (8, 32)
    sizes = {"N": 5, "D": 48, "V": 40, "masked": 2} if scale.name == "tiny" else {}
    compiled = scale.device.type == "cuda" or scale.name != "default"
    return {
        f"{kind}B={batch}-{'training' if backward else 'inference'}": PointwiseCase(
            kind, batch, backward, scale.dtype, scale.device, compiled, **sizes
        )
        for kind in kinds
        for batch in scale.pick(tiny=(2,), cpu=(8,), gpu=(256,), full=full)
        for backward in (True, False)
    }


def draws(case: PointwiseCase) -> Callable[..., Tensor]:
    """Random tensors of one seed, on the device."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32, gradient: bool = True) -> Tensor:
        tensor = torch.randn(shape, generator=generator).to(case.device, dtype)
        return tensor.requires_grad_(gradient and case.backward)

    return draw


def passes(
    case: PointwiseCase, forward: Callable[..., Sequence[Tensor]], inputs: dict[str, Tensor], grads: list[Tensor]
) -> Implementation:
    """Forward, and with `case.backward` the gradients of all inputs that have one, as a network would ask for them.

    In half precision outputs that count are left out of the result: a logit that is rounded may change them by one.
    """
    learned = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}

    def run() -> dict[str, Tensor]:
        with torch.set_grad_enabled(case.backward):
            outputs = list(forward(**inputs))
        counted = [case.dtype == "float32" or output.is_floating_point() for output in outputs]
        found = {f"output {i}": output.detach() for i, output in enumerate(outputs) if counted[i]}
        if case.backward:
            pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=False) if o.requires_grad]
            gradients = torch.autograd.grad([o for o, _ in pairs], list(learned.values()), [g for _, g in pairs])
            found |= {f"gradient of {name}": g for name, g in zip(learned, gradients, strict=True)}
        return found

    return Implementation(run, run)


def exact_and_eager(
    case: PointwiseCase, plain: Callable[..., Sequence[Tensor]], inputs: dict[str, Tensor], grads: list[Tensor],
    within: Callable[[], Any] = nullcontext,
) -> Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]] | None:  # fmt: skip
    """`Comparison.exact` of plain operations, in fp64 and `within` a context in the case's dtype; None in fp32."""
    if case.dtype == "float32":
        return None

    def results() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        wide = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in inputs.items()}
        with within():
            narrow = passes(case, plain, inputs, grads).run()
        return passes(case, plain, wide, grads).run(), narrow

    return results


def compiled(case: PointwiseCase, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function torch.compile has made; it is compiled at its first call, before the clock starts."""
    if not case.compiled:
        raise Unavailable("compiling takes minutes on a CPU: --full")
    torch._dynamo.reset()
    return torch.compile(forward, fullgraph=True, dynamic=False)


def needs_gpu(case: PointwiseCase) -> None:
    if case.device.type != "cuda":
        raise Unavailable("Liger's kernels are Triton programs: they need a GPU")
