"""`accelerate` on models of timm and transformers: the same object before and after, inference and training.

    pytest benchmarks/bench_drop_in.py --benchmark-only

In the eager rows one object is switched by `accelerate` and `restore` outside the clock, so both sides have the same
parameters, at the same addresses. Outputs, losses and gradients are compared before anything is timed. Training is
forward and backward; an optimizer's step would be the same on both sides. On a GPU, or with --full, both sides are also
run under torch.compile, and inference of one image also as a CUDA graph.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import beit_fast
from benchmarks.baselines.libraries import timm_beit, transformers_beit
from benchmarks.harness import OURS, Comparison, Implementation, Unavailable, captured
from benchmarks.models import CHECKED, TABLE, ModelCase, autocast, forward_flops, with_tables

SEGMENTED = ("BeitBackbone", "BeitForSemanticSegmentation")
MODELS = ("timm", "BeitForImageClassification", "BeitForMaskedImageModeling")
WAYS = ("", ", compiled", ", CUDA graph")


def cases(scale: Any) -> dict[str, ModelCase]:
    gpu, full = scale.device.type == "cuda", scale.name == "full"
    few = MODELS if gpu or full else (MODELS[0], MODELS[2])
    sizes = [(name, "base", 224, 256 if gpu else 2 if full else 1) for name in few]
    if gpu or full:
        sizes += [(MODELS[0], "base", 224, 1)]
    if full:
        sizes += [(name, "base", 224, 64 if gpu else 2) for name in ("BeitModel", *SEGMENTED)]
        sizes += [(name, "large", 224, 128 if gpu else 1) for name in MODELS]
        sizes += [(name, "base", 384, 64 if gpu else 1) for name in MODELS]
    if scale.name == "tiny":
        sizes = [(name, "tiny", 64, 2) for name in (*MODELS, "BeitModel", *SEGMENTED)]
    toy = {"depth": 4} if scale.name == "tiny" else {}
    return {
        f"{kind}-{size}-{side}-{batch}-{'training' if training else 'inference'}": ModelCase(
            size, "plus", side, batch, scale, training, kind, toy
        )
        for kind, size, side, batch in sizes
        for training in ((False, True) if batch > 1 or not (gpu or full) else (False,))
    }


def compare(case: ModelCase) -> Comparison:
    masked = case.kind == "BeitForMaskedImageModeling"
    config = case.config if masked else case.config.for_classification(8 if case.tiny else 1000)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch_size, 3, *config.image_hw, generator=generator).to(case.device)
    mask = torch.rand(case.batch_size, config.num_patches, generator=generator).argsort(1) < config.num_patches * 0.38
    inputs: dict[str, Any] = {"pixel_values": images}
    if masked:
        inputs["bool_masked_pos"] = mask.to(case.device)
    if masked and case.training:
        labels = torch.randint(0, config.vocab_size, (int(mask.sum()),), generator=generator)
        inputs["labels"] = labels.to(case.device)
    library = "timm" if case.kind == "timm" else "transformers"

    @functools.cache
    def theirs() -> nn.Module:
        if case.kind == "timm":
            return with_tables(timm_beit(config)).to(case.device).train(case.training)
        options: dict[str, Any] = {}
        if case.kind in SEGMENTED:
            options = {"out_indices": [1, 2, 3, 4] if case.tiny else [4, 6, 8, 12], "num_labels": 20}
        if case.kind == "BeitBackbone":
            options["add_fpn"] = True
        return with_tables(transformers_beit(config, case.kind, **options)).to(case.device).train(case.training)

    few = {name: tensor[:CHECKED] for name, tensor in inputs.items()}
    if "labels" in inputs:
        few["labels"] = inputs["labels"][: int(mask[:CHECKED].sum())]

    def output_of(model: nn.Module, given: dict[str, Tensor]) -> Any:
        if case.kind == "timm":
            return model(given["pixel_values"])
        output = model(**given)
        first = output["loss"] if "labels" in given else output[0]
        return first[-1] if isinstance(first, tuple) else first

    def run(model: nn.Module, given: dict[str, Tensor] = inputs, dtype: torch.dtype = case.dtype) -> dict[str, Tensor]:
        """Forward, in training backward too; gives the loss or output, and gradients of both ends."""
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(case.training), autocast(case.device, dtype):
            output = output_of(model, given)
        if not case.training:
            return {"output": output}
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        loss = output if output.dim() == 0 else F.mse_loss(output, torch.ones_like(output))
        loss.backward()
        named = [(n.replace("_orig_mod.", ""), p.grad) for n, p in model.named_parameters()
                 if n.endswith((TABLE, "cls_token")) and p.grad is not None]  # fmt: skip
        return {"loss": loss.detach(), **dict([named[0], named[-1]])}

    def exact() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Their model as it came, in fp64 and in the dtype of the case."""
        plain = copy.deepcopy(beit_fast.restore(theirs()))
        narrow = run(plain, few)
        narrow = {name: tensor.clone() for name, tensor in narrow.items()}  # its gradients become fp64 with it
        wide = few | {"pixel_values": few["pixel_values"].double()}
        return run(plain.double(), wide, torch.float64), narrow

    def side(change: Callable[[nn.Module], nn.Module], way: str) -> Implementation:
        if way == "":
            model = theirs()
            return Implementation(lambda: run(model), lambda: run(change(model), few), lambda: change(model))
        if not case.everything:
            raise Unavailable("takes minutes on a CPU: --full")
        changed = change(copy.deepcopy(theirs()))
        if way == ", compiled":
            compiled: Any = torch.compile(changed, dynamic=False)
            return Implementation(lambda: run(compiled), lambda: run(compiled, few))
        if case.device.type != "cuda" or case.batch_size > 1:
            raise Unavailable("CUDA graphs need a GPU, and are for one image")
        replay = captured(lambda: run(changed))
        return Implementation(replay, replay)

    in_loss = int(mask.sum()) // case.batch_size if "labels" in inputs else 0
    what = "timm's Beit" if case.kind == "timm" else case.kind
    return Comparison(
        group=f"accelerate on {what}, {'training' if case.training else 'inference'}: {case.what}",
        implementations={
            who + way: functools.partial(side, change, way)
            for way in WAYS
            for who, change in ((OURS, beit_fast.accelerate), (library, beit_fast.restore))
        },
        shapes={"B": case.batch_size, "N": config.num_patches + 1, "D": config.width, "L": config.depth},
        dtype=case.scale.dtype, images=case.batch_size, tolerance=tolerance(case),
        exact=None if case.dtype == torch.float32 else exact,
        flops=(3 if case.training else 1) * case.batch_size * forward_flops(config, in_loss),
    )  # fmt: skip


def tolerance(case: ModelCase) -> float:
    """Of outputs, losses and gradients in fp32, relative.

    Batch normalisation and ReLU in the segmentation head multiply rounding: in fp32 both sides' gradients are 6e-4 from
    those in fp64.
    """
    return 2e-3 if case.training and case.kind == "BeitForSemanticSegmentation" else 1e-4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_drop_in(interleaved, case, who, way):
    library = "timm" if case.kind == "timm" else "transformers"
    interleaved(case, lambda: compare(case), (OURS if who == "ours" else library) + way, 20.0)
