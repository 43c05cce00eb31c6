"""The classifier: beit_fast beside timm and transformers, inference and a whole training step.

    pytest benchmarks/bench_backbone.py --benchmark-only

Same weights and images for all; logits, and in training loss and gradients, are compared before anything is timed.
Inference is one call without gradients in eval mode. The training step is forward, cross-entropy, backward and a fused
AdamW, the same one for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast import BeitConfig
from beit_fast.models import Beit, convert_state_dict
from benchmarks.baselines.libraries import timm_beit, transformers_beit
from benchmarks.harness import OURS, Absent, Comparison, Rival
from benchmarks.mim_batches import forward_flops

RIVALS = [OURS, "timm", "timm, compiled", "transformers, SDPA", "transformers, eager"]
LEARNING_RATE = 1e-6  # the step is timed, not the training: weights should stay where they are


@dataclass(frozen=True)
class Case:
    size: Any
    preset: Any
    image_size: int
    batch_size: int
    training: bool
    dtype: str
    device: torch.device
    tiny: bool = False
    all_rivals: bool = False
    """Compiled ones too, and transformers without SDPA."""
    budget_s: float = 12.0

    @property
    def config(self) -> BeitConfig:
        small = {"width": 48, "num_heads": 3, "depth": 2} if self.tiny else {}
        return BeitConfig.from_preset(self.size, self.preset, image_size=self.image_size, **small).for_classification(
            10 if self.tiny else 1000
        )

    @property
    def what(self) -> str:
        name = "toy" if self.tiny else f"BEiT-{self.size}"
        return f"{name} {self.preset}, {self.image_size} px, B={self.batch_size}, {self.dtype}"


def cases(scale: Any) -> dict[str, Case]:
    gpu = scale.device.type == "cuda"
    if scale.name == "tiny":
        grid = [("tiny", preset, 32, 2) for preset in ("plus", "plain")]
    elif not gpu:
        grid = [("base", "plus", 224, 2)]
        if scale.name == "full":
            grid += [("base", "plain", 224, 2), ("base", "plus", 384, 1), ("large", "plus", 224, 1),
                     ("large", "plus", 384, 1)]  # fmt: skip
    else:
        grid = [("base", "plus", 224, 256), ("large", "plus", 224, 128)]
        if scale.name == "full":
            grid += [("base", "plain", 224, 256), ("base", "plus", 384, 64), ("large", "plus", 384, 32)]
    return {
        f"{size}-{preset}-{side}-B={batch}-{'training' if training else 'inference'}": Case(
            size, preset, side, batch, training, scale.dtype, scale.device, scale.name == "tiny",
            gpu or scale.name == "full",
        )
        for size, preset, side, batch in grid
        for training in (False, True)
    }  # fmt: skip


def compare(case: Case) -> Comparison:
    config, device, dtype = case.config, case.device, getattr(torch, case.dtype)
    torch.manual_seed(0)
    model = Beit(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_position_bias_table"):  # a bias of zeros could hide a mistake
                parameter.normal_(std=0.3)
            elif name == "head.weight":  # as it begins, all logits are nearly equal
                parameter.normal_(std=0.02)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch_size, config.in_chans, *config.image_hw, generator=generator).to(device)
    labels = torch.randint(0, config.num_classes, (case.batch_size,), generator=generator).to(device)
    probes = ("patch_embed.proj.weight", f"blocks.{config.depth // 2}.attn.qkv.weight", "blocks.0.mlp.fc1.bias",
              "fc_norm.weight", "head.weight")  # fmt: skip
    if config.relative_position_bias != "none":
        probes += ("blocks.0.attn.relative_position_bias_table",)

    def rival(
        net: nn.Module,
        logits_of: Callable[[Tensor], Tensor],
        official: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    ) -> Rival:
        def forward() -> Tensor:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                return logits_of(images)

        if not case.training:
            net.eval()

            @torch.no_grad()  # transformers keeps an index that inference mode would spoil for training
            def infer() -> dict[str, Tensor]:
                return {"logits": forward().float()}

            return Rival(infer, infer)
        net.train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, fused=True)

        def backward() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(forward().float(), labels)
            loss.backward()
            return loss

        def step() -> None:
            backward()
            optimizer.step()

        def result() -> dict[str, Tensor]:
            loss = backward().detach()
            grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
            found = official(grads)
            return {"loss": loss, **{name: found[name] for name in probes}}

        return Rival(step, result)

    def ours() -> Rival:
        net = model.to(device)
        return rival(net, net, dict)

    def timm(compiled: bool) -> Rival:
        if compiled and not case.all_rivals:
            raise Absent("takes minutes on a CPU: --full")
        net = timm_beit(config)
        net.load_state_dict(convert_state_dict(state, to="timm"))
        net.to(device)
        return rival(net, torch.compile(net) if compiled else net, dict)

    def transformers(attention: str) -> Rival:
        if attention == "eager" and not (case.all_rivals or case.tiny):
            raise Absent("slower than with SDPA: --full")
        net = transformers_beit(config, "BeitForImageClassification", attn_implementation=attention)
        net.load_state_dict(convert_state_dict(state, to="transformers"))
        net.to(device)
        return rival(net, lambda x: net(x).logits, lambda grads: convert_state_dict(grads, to="official"))

    return Comparison(
        group=f"backbone, {'training step' if case.training else 'inference'}: {case.what}",
        rivals={
            OURS: ours,
            "timm": lambda: timm(False),
            "timm, compiled": lambda: timm(True),
            "transformers, SDPA": lambda: transformers("sdpa"),
            "transformers, eager": lambda: transformers("eager"),
        },
        shapes={"B": case.batch_size, "N": config.num_patches + 1, "D": config.width},
        dtype=case.dtype,
        flops=(3 if case.training else 1) * case.batch_size * forward_flops(config, 0),
        images=case.batch_size,
        tolerance=1e-4 if case.dtype == "float32" else 5e-2,
    )


@pytest.mark.parametrize("rival", RIVALS)
def test_backbone(in_turns, case, rival):
    in_turns(case, lambda: compare(case), rival, case.budget_s)
