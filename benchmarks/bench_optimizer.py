"""Gradient clipping and AdamW over the parameters of a BEiT: beit_fast's step beside torch's, timm's and apex's.

    pytest benchmarks/bench_optimizer.py --benchmark-only

All clip the global norm to 3 and take one AdamW step with the official decay groups; the parameters after two steps are
compared first. beit_fast's also skips a step whose gradient is not finite, without asking the host.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beit_fast import BeitConfig, BeitForMaskedImageModeling
from beit_fast.train.config import OptimConfig
from beit_fast.train.optim import build_optimizer, decay_groups, load_apex, optimizer_step
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable
from benchmarks.harness import OURS, Comparison, Implementation, Unavailable

NAMES = [OURS, "torch fused", "torch foreach", "torch for loop", "timm", "apex FusedAdam"]
CLIP, RATE, DECAY = 3.0, 1e-4, 0.05


@dataclass(frozen=True)
class Case:
    size: Any
    device: torch.device
    tiny: bool
    budget_s: float = 10.0


def cases(scale: Any) -> dict[str, Case]:
    full = ("base", "large") if scale.device.type == "cuda" else ("small", "base", "large")
    sizes = scale.pick(tiny=("tiny",), cpu=("tiny",), gpu=("base", "large"), full=full)
    return {size: Case(size, scale.device, scale.name == "tiny") for size in sizes}


def compare(case: Case) -> Comparison:
    device = case.device
    small: dict[str, Any] = {"depth": 1, "vocab_size": 64} if case.tiny else {}
    with torch.device("meta"):
        shapes = {
            name: p.shape
            for name, p in BeitForMaskedImageModeling(BeitConfig.from_preset(case.size, **small)).named_parameters()
        }
    count = sum(shape.numel() for shape in shapes.values())

    class Weights(nn.Module):
        """Parameters with the names and shapes of the model, and a gradient each; the same for everyone."""

        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator(device).manual_seed(0)
            self.named: dict[str, nn.Parameter] = {}
            for name, shape in shapes.items():
                parameter = nn.Parameter(torch.randn(shape, generator=generator, device=device) * 0.02)
                parameter.grad = torch.randn(shape, generator=generator, device=device) * 1e-3
                self.named[name] = parameter

        def named_parameters(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
            return iter(self.named.items())

    def groups(weights: Weights) -> list[dict[str, Any]]:
        return decay_groups(weights, DECAY)

    def stepped(weights: Weights, step: Any) -> Implementation:
        gradients = [p.grad for p in weights.named.values()]

        def restore() -> None:
            """Clipping in place would leave the next call nothing to clip."""
            torch._foreach_copy_(gradients, saved)

        saved = [g.clone() for g in gradients if g is not None]

        def result() -> dict[str, Tensor]:
            for _ in range(2):
                restore()
                step()
            names = list(shapes)
            return {name: weights.named[name].detach().clone() for name in (names[0], names[len(names) // 2])}

        return Implementation(step, result, restore)

    def ours() -> Implementation:
        weights = Weights()
        optimizer = build_optimizer(groups(weights), OptimConfig(lr=RATE))
        one = torch.ones((), device=device)
        return stepped(weights, lambda: optimizer_step(optimizer, one, CLIP))

    def stepping(make: Any) -> Implementation:
        weights = Weights()
        plain = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups(weights)]
        optimizer = make(plain)
        parameters = list(weights.named.values())

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()

        return stepped(weights, step)

    def timm() -> Implementation:
        make_torchvision_importable()
        from timm.optim import create_optimizer_v2

        def make(plain: list[dict[str, Any]]) -> torch.optim.Optimizer:
            return create_optimizer_v2(plain, opt="adamw", lr=RATE, weight_decay=DECAY)

        return stepping(make)

    def apex() -> Implementation:
        try:
            fused = load_apex()
        except ModuleNotFoundError as reason:
            raise Unavailable(str(reason).removeprefix("--optim.impl apex: ").split(";")[0]) from None
        return stepping(lambda plain: fused(plain, lr=RATE, adam_w_mode=True))  # type: ignore[call-arg]

    def torch_adamw(**options: bool) -> Implementation:
        return stepping(lambda plain: torch.optim.AdamW(plain, lr=RATE, **options))

    return Comparison(
        group=f"optimizer step with clipping: BEiT-{case.size}, {count / 1e6:.0f} M parameters in fp32",
        implementations={
            OURS: ours,
            "torch fused": lambda: torch_adamw(fused=True),
            "torch foreach": lambda: torch_adamw(foreach=True),
            "torch for loop": lambda: torch_adamw(foreach=False),
            "timm": timm,
            "apex FusedAdam": apex,
        },
        shapes={"parameters": count},
        # gradients once for their norm; then weights and both moments read and written, gradients read
        bytes=4.0 * count * (1 + 3 * 2 + 1),
        tolerance=1e-5,
    )


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_step(interleaved, case, name):
    interleaved(case, lambda: compare(case), name, case.budget_s)
