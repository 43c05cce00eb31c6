"""beit_fast's own step under its options: CUDA graph, compiled blocks, checkpointing, another attention, no bias.

    pytest benchmarks/bench_step_options.py --benchmark-only

One pre-training step with the tokens given: forward, backward, clipping, AdamW. Losses are compared where the option
must not change them. `no position bias` is the preset `plus` without its table: what the bias costs.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from beit_fast import BeitForMaskedImageModeling, use_backend
from benchmarks.harness import OURS, Comparison, Implementation, Unavailable, captured
from benchmarks.models import (
    ModelCase,
    OurStep,
    exact_loss,
    forward_flops,
    make_batch,
    make_model,
    model_cases,
)

NAMES = [
    OURS,
    "beit_fast, CUDA graph",
    "beit_fast, compiled blocks",
    "beit_fast, SDPA attention",
    "beit_fast, gradient checkpointing",
    "beit_fast, no position bias",
]


def cases(scale: Any) -> dict[str, ModelCase]:
    return model_cases(
        scale, tiny=[("tiny", "plus", 32, 2)], cpu=[("small", "plus", 224, 1)],
        cpu_full=[("small", "plus", 224, 2), ("base", "plus", 224, 2), ("large", "plus", 224, 1)],
        gpu=[("base", "plus", 224, 256), ("large", "plus", 224, 128)], gpu_full=[("base", "plus", 224, 64)],
    )  # fmt: skip


def compare(case: ModelCase) -> Comparison:
    config, device = case.config, case.device
    batch, model = make_batch(config, case.batch_size, device), make_model(config, device)

    def fresh() -> OurStep:
        return OurStep(copy.deepcopy(model), batch, case.dtype, update=True)

    def option(step: Callable[[], Tensor], same: bool = True) -> Implementation:
        return Implementation(step, (lambda: {"loss": step().clone()}) if same else None)

    def compiled() -> Implementation:
        if not case.everything:
            raise Unavailable("compiling takes minutes on a CPU: --full")
        step = fresh()
        for block in step.model.layers():
            block.compile()
        return option(step)

    def sdpa() -> Implementation:
        step = fresh()

        def run() -> Tensor:
            with use_backend("sdpa"):
                return step()

        return option(run)

    def checkpointing() -> Implementation:
        step = fresh()
        step.model.set_grad_checkpointing()
        return option(step)

    def no_bias() -> Implementation:
        torch.manual_seed(0)
        bare = BeitForMaskedImageModeling(replace(config, relative_position_bias="none")).to(device)
        return option(OurStep(bare, batch, case.dtype, update=True), same=False)

    def graph() -> Implementation:
        step = fresh()
        assert step.optimizer is not None
        for group in step.optimizer.param_groups:
            group["capturable"] = True
        return option(captured(step))

    builders = (lambda: option(fresh()), graph, compiled, sdpa, checkpointing, no_bias)

    masked = batch.labels.shape[0]
    return Comparison(
        group=f"options of our own step: {case.what}",
        implementations=dict(zip(NAMES, builders, strict=True)),
        shapes={"B": case.batch_size, "N": config.num_patches + 1, "M": masked, "D": config.width},
        dtype=case.scale.dtype, images=case.batch_size, tolerance=1e-5,
        exact=exact_loss(config, model.state_dict(), batch, case.dtype),
        flops=3 * case.batch_size * forward_flops(config, masked // case.batch_size),
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_step(interleaved, case, name):
    interleaved(case, lambda: compare(case), name)
