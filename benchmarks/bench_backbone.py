"""The classifier: beit_fast beside timm and transformers, inference and a whole training step.

    pytest benchmarks/bench_backbone.py --benchmark-only

Same weights and images for all; logits, and in training loss and gradients, are compared before anything is timed.
Inference is one call without gradients in eval mode. The training step is forward, cross-entropy, backward and a fused
AdamW, the same one for all; at 384 pixels it is that of fine-tuning.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit_fast import use_backend
from beit_fast.models import Beit, convert_state_dict
from benchmarks.baselines.libraries import timm_beit, transformers_beit
from benchmarks.harness import OURS, Comparison, Implementation, Unavailable
from benchmarks.models import CHECKED, LEARNING_RATE, TABLE, ModelCase, forward_flops, model_cases, with_tables

NAMES = [OURS, "timm", "timm, compiled", "transformers, SDPA", "transformers, eager"]


def cases(scale: Any) -> dict[str, ModelCase]:
    return {
        f"{name}-{'training' if training else 'inference'}": case
        for training in (False, True)
        for name, case in model_cases(
            scale, tiny=[("tiny", "plus", 32, 2), ("tiny", "plain", 32, 2)], cpu=[("base", "plus", 224, 1)],
            cpu_full=[("base", "plus", 224, 2), ("base", "plain", 224, 2), ("base", "plus", 384, 1),
                      ("large", "plus", 224, 1), ("large", "plus", 384, 1)],
            gpu=[("base", "plus", 224, 256), ("large", "plus", 224, 128), ("base", "plus", 384, 64)],
            gpu_full=[("base", "plain", 224, 256), ("large", "plus", 384, 32)], training=training,
        ).items()
    }  # fmt: skip


def compare(case: ModelCase) -> Comparison:
    config, device, dtype = case.config.for_classification(10 if case.tiny else 1000), case.device, case.dtype
    model = with_tables(Beit(config))
    nn.init.normal_(model.get_parameter("head.weight"), std=0.02)  # as it begins, all logits are nearly equal
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch_size, config.in_chans, *config.image_hw, generator=generator).to(device)
    labels = torch.randint(0, config.num_classes, (case.batch_size,), generator=generator).to(device)
    compared = ["patch_embed.proj.weight", f"blocks.{config.depth // 2}.attn.qkv.weight", "blocks.0.mlp.fc1.bias",
                "fc_norm.weight", "head.weight"]  # fmt: skip
    if config.relative_position_bias != "none":
        compared.append(f"blocks.0.attn.{TABLE}")
    Official = Callable[[dict[str, Tensor]], dict[str, Tensor]]

    def implementation(net: nn.Module, logits_of: Callable[[Tensor], Tensor], official: Official = dict) -> Any:
        net.to(device).train(case.training)

        def logits(given: Tensor) -> Tensor:
            with case.autocast():
                return logits_of(given).float()

        if not case.training:

            @torch.no_grad()  # transformers keeps an index that inference mode would spoil for training
            def infer(given: Tensor = images) -> dict[str, Tensor]:
                return {"logits": logits(given)}

            return Implementation(infer, lambda: infer(images[:CHECKED]))
        optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, fused=True)

        def backward(count: int) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(logits(images[:count]), labels[:count])
            loss.backward()
            return loss.detach()

        def step() -> None:
            backward(case.batch_size)
            optimizer.step()

        def result() -> dict[str, Tensor]:
            loss = backward(CHECKED)
            found = official({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
            return {"loss": loss, **{name: found[name] for name in compared}}

        return Implementation(step, result)

    def timm(compiled: bool) -> Implementation:
        if compiled and case.scale.name != "full":
            raise Unavailable("takes minutes: --full")
        net = timm_beit(config)
        net.load_state_dict(convert_state_dict(state, to="timm"))
        return implementation(net, torch.compile(net, dynamic=False) if compiled else net)

    def transformers(attention: str) -> Implementation:
        if attention == "eager" and not (case.everything or case.tiny):
            raise Unavailable("slower than with SDPA: --full")
        net = transformers_beit(config, "BeitForImageClassification", attn_implementation=attention)
        net.load_state_dict(convert_state_dict(state, to="transformers"))
        return implementation(net, lambda x: net(x).logits, lambda grads: convert_state_dict(grads, to="official"))

    def exact() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Our model from plain operations, in fp64 and in the dtype of the case."""
        with use_backend("reference"):
            copied = copy.deepcopy(model)
            narrow = implementation(copied, copied).result()
            wide_model = copy.deepcopy(model).to(device).double()
            wide = implementation(wide_model, lambda x: _without_autocast(wide_model, x, device)).result()
        return wide, narrow

    return Comparison(
        group=f"backbone, {'training step' if case.training else 'inference'}: {case.what}",
        implementations={
            OURS: lambda: implementation(model, model),
            "timm": lambda: timm(False),
            "timm, compiled": lambda: timm(True),
            "transformers, SDPA": lambda: transformers("sdpa"),
            "transformers, eager": lambda: transformers("eager"),
        },
        shapes={"B": case.batch_size, "N": config.num_patches + 1, "D": config.width},
        dtype=case.scale.dtype, images=case.batch_size,
        flops=(3 if case.training else 1) * case.batch_size * forward_flops(config, 0),
        exact=None if dtype == torch.float32 else exact,
    )  # fmt: skip


def _without_autocast(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    with torch.autocast(device.type, enabled=False):
        return model(images.double())


@pytest.mark.parametrize("name", NAMES)
def test_backbone(interleaved, case, name):
    interleaved(case, lambda: compare(case), name, 12.0)
