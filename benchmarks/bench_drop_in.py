"""What one line brings: the BEiTs of timm and transformers before and after `beit_fast.accelerate`.

    pytest benchmarks/bench_drop_in.py --benchmark-only

There is one model: before each timed call it is accelerated or restored, so both sides have the same parameters, at
the same addresses. Outputs, losses and gradients are compared before anything is timed. Training is
forward and backward; an optimizer's step would be the same on both sides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import beit_fast
from beit_fast import BeitConfig
from benchmarks.baselines.libraries import timm_beit, transformers_beit
from benchmarks.harness import OURS, Comparison, Rival
from benchmarks.mim_batches import forward_flops

TABLE = "relative_position_bias_table"
SEGMENTED = {"BeitForSemanticSegmentation", "BeitBackbone"}


@dataclass(frozen=True)
class Case:
    kind: str
    """`timm`, or a class of transformers."""
    training: bool
    size: Any
    batch_size: int
    dtype: str
    device: torch.device
    image_size: int = 224
    tiny: bool = False
    budget_s: float = 20.0

    @property
    def config(self) -> BeitConfig:
        small = {"width": 48, "num_heads": 3, "depth": 4, "vocab_size": 64} if self.tiny else {}
        config = BeitConfig.from_preset(self.size, image_size=self.image_size, **small)
        return config if self.masked else config.for_classification(8 if self.tiny else 1000)

    @property
    def masked(self) -> bool:
        return self.kind == "BeitForMaskedImageModeling"

    @property
    def rival(self) -> str:
        return "timm" if self.kind == "timm" else "transformers"

    @property
    def group(self) -> str:
        what = "timm's Beit" if self.kind == "timm" else self.kind
        size = "toy" if self.tiny else f"BEiT-{self.size}"
        return (
            f"accelerate on {what}, {'training' if self.training else 'inference'}: "
            f"{size}, {self.image_size} px, B={self.batch_size}, {self.dtype}"
        )


def cases(scale: Any) -> dict[str, Case]:
    gpu = scale.device.type == "cuda"
    names = ["timm", "BeitForImageClassification", "BeitForMaskedImageModeling"]
    few = names if gpu or scale.name == "full" else [names[0], names[2]]
    sizes: list[tuple[str, str, int, int]] = [(name, "base", 224, 256 if gpu else 2) for name in few]
    if scale.name == "full":
        others = ("BeitModel", "BeitBackbone", "BeitForSemanticSegmentation")
        sizes += [(name, "base", 224, 64 if gpu else 2) for name in others]
        sizes += [(name, "large", 224, 128 if gpu else 1) for name in names]
        sizes += [(name, "base", 384, 64 if gpu else 1) for name in names]
    if scale.name == "tiny":
        sizes = [(name, "tiny", 64, 2) for name in (*names, "BeitModel", *sorted(SEGMENTED))]
    return {
        f"{kind}-{size}-{side}-{'training' if training else 'inference'}": Case(
            kind, training, size, batch, scale.dtype, scale.device, side, scale.name == "tiny"
        )
        for kind, size, side, batch in sizes
        for training in (False, True)
    }


def compare(case: Case) -> Comparison:
    config, device = case.config, case.device
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch_size, 3, *config.image_hw, generator=generator).to(device)
    mask = torch.rand(case.batch_size, config.num_patches, generator=generator).argsort(1) < config.num_patches * 0.38
    run = step(case, images, mask.to(device), generator)

    @functools.cache
    def theirs() -> nn.Module:
        return noisy(peer(case)).to(device).train(case.training)

    def side(change: Callable[[nn.Module], nn.Module]) -> Rival:
        model = theirs()
        return Rival(lambda: run(model), lambda: run(change(model)), lambda: change(model))

    masked = int(mask.sum()) // case.batch_size if case.masked and case.training else 0
    return Comparison(
        group=case.group,
        rivals={OURS: lambda: side(beit_fast.accelerate), case.rival: lambda: side(beit_fast.restore)},
        shapes={"B": case.batch_size, "N": config.num_patches + 1, "D": config.width, "L": config.depth},
        dtype=case.dtype,
        flops=(3 if case.training else 1) * case.batch_size * forward_flops(config, masked),
        images=case.batch_size,
        tolerance=tolerance(case),
    )


def tolerance(case: Case) -> float:
    """Of outputs, losses and gradients, relative.

    Batch normalisation and ReLU in the segmentation head multiply rounding: in fp32 both sides' gradients are 6e-4 from
    those in fp64.
    """
    if case.dtype != "float32":
        return 5e-2
    return 2e-3 if case.training and case.kind == "BeitForSemanticSegmentation" else 1e-4


def peer(case: Case) -> nn.Module:
    """The model as its library makes it."""
    if case.kind == "timm":
        return timm_beit(case.config)
    options: dict[str, Any] = {}
    if case.kind in SEGMENTED:
        options = {"out_indices": [1, 2, 3, 4] if case.tiny else [4, 6, 8, 12], "num_labels": 20}
    if case.kind == "BeitBackbone":
        options["add_fpn"] = True
    return transformers_beit(case.config, case.kind, **options)


def noisy(model: nn.Module) -> nn.Module:
    """Tables that are not zero: a bias of zeros could hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(TABLE):
                parameter.normal_(std=0.3)
    return model


def step(
    case: Case, images: Tensor, mask: Tensor, generator: torch.Generator
) -> Callable[[nn.Module], dict[str, Tensor]]:
    """What is timed: forward, in training backward too; gives the loss or output and gradients of both ends."""
    dtype = getattr(torch, case.dtype)
    inputs: dict[str, Any] = {"pixel_values": images}
    if case.masked:
        inputs["bool_masked_pos"] = mask
        if case.training:
            inputs["labels"] = torch.randint(0, case.config.vocab_size, (int(mask.sum()),), generator=generator).to(
                images.device
            )

    def output_of(model: nn.Module) -> Any:
        if case.kind == "timm":
            return model(images)
        output = model(**inputs)
        first = output["loss"] if "labels" in inputs else output[0]
        return first[-1] if isinstance(first, tuple) else first

    def run(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        with (
            torch.set_grad_enabled(case.training),
            torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            output = output_of(model)
        if not case.training:
            return {"output": output}
        loss = output if output.dim() == 0 else F.mse_loss(output.float(), torch.ones_like(output, dtype=torch.float))
        loss.backward()
        named = [(n, p) for n, p in model.named_parameters() if n.endswith((TABLE, "cls_token")) and p.grad is not None]
        return {"loss": loss.detach(), **{n: p.grad for n, p in (named[0], named[-1]) if p.grad is not None}}

    return run


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_drop_in(in_turns, case, who):
    in_turns(case, lambda: compare(case), OURS if who == "ours" else case.rival, case.budget_s)
