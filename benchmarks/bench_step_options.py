"""beit_fast's own step under its options: CUDA graph, compiled blocks, checkpointing, another attention, no bias.

    pytest benchmarks/bench_step_options.py --benchmark-only

One pre-training step with the tokens given: forward, backward, clipping, AdamW. Losses are compared where the option
must not change them. `no position bias` is the preset `plus` without its table: what the bias costs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from beit_fast import BeitConfig, BeitForMaskedImageModeling, use_backend
from beit_fast.train.optim import decay_groups, optimizer_step
from benchmarks.harness import OURS, Absent, Comparison, Rival
from benchmarks.mim_batches import MimBatch, forward_flops, make_batch, make_model

RIVALS = [
    OURS,
    "beit_fast, CUDA graph",
    "beit_fast, compiled blocks",
    "beit_fast, SDPA attention",
    "beit_fast, gradient checkpointing",
    "beit_fast, no position bias",
]


@dataclass(frozen=True)
class Case:
    size: Any
    batch_size: int
    dtype: str
    device: torch.device
    tiny: bool
    compiled: bool
    budget_s: float = 10.0

    @property
    def config(self) -> BeitConfig:
        small: dict[str, Any] = {"width": 48, "num_heads": 3, "depth": 2, "vocab_size": 64, "image_size": 32}
        return BeitConfig.from_preset(self.size, "plus", **(small if self.tiny else {}))


def cases(scale: Any) -> dict[str, Case]:
    sizes = scale.pick(tiny={"tiny": 2}, cpu={"small": 2}, gpu={"base": 256, "large": 128}, full={"base": 2, "large": 1}
                       if scale.device.type == "cpu" else {"base": 256, "base ": 64, "large": 128})  # fmt: skip
    gpu = scale.device.type == "cuda"
    return {
        f"{size}-{batch}": Case(
            size.strip(), batch, scale.dtype, scale.device, scale.name == "tiny", gpu or scale.name == "full"
        )
        for size, batch in sizes.items()
    }


class Step:
    """Forward, backward, clipping and AdamW on fixed inputs, without a host sync."""

    def __init__(self, model: BeitForMaskedImageModeling, batch: MimBatch, dtype: torch.dtype) -> None:
        self.model, self.batch, self.dtype = model.train(), batch, dtype
        self.optimizer = torch.optim.AdamW(decay_groups(model, 0.05), lr=1e-6, fused=True)
        self.one = torch.ones((), device=batch.images.device)
        self.rows = batch.mask.flatten().nonzero().squeeze(1)
        self.count = torch.tensor(float(self.rows.shape[0]), device=batch.images.device)

    def __call__(self) -> Tensor:
        b = self.batch
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(b.images.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(b.images, b.mask, b.labels, num_targets=self.count, masked_indices=self.rows).loss
        loss.backward()
        optimizer_step(self.optimizer, self.one, 3.0)
        return loss.detach()


def captured(step: Step) -> Callable[[], Tensor]:
    """The step as a CUDA graph, replayed by each call."""
    if step.one.device.type != "cuda":
        raise Absent("CUDA graphs need a GPU")
    for group in step.optimizer.param_groups:
        group["capturable"] = True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    step.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def compare(case: Case) -> Comparison:
    config, device, dtype = case.config, case.device, getattr(torch, case.dtype)
    batch = make_batch(config, case.batch_size, device)
    model = make_model(config, device)

    def fresh() -> Step:
        return Step(copy.deepcopy(model), batch, dtype)

    def rival(step: Callable[[], Tensor], same: bool = True) -> Rival:
        return Rival(step, (lambda: {"loss": step().clone()}) if same else None)

    def compiled() -> Rival:
        if not case.compiled:
            raise Absent("compiling takes minutes on a CPU: --full")
        step = fresh()
        for block in step.model.layers():
            block.compile()
        return rival(step)

    def sdpa() -> Rival:
        step = fresh()

        def run() -> Tensor:
            with use_backend("sdpa"):
                return step()

        return rival(run)

    def checkpointing() -> Rival:
        step = fresh()
        step.model.set_grad_checkpointing()
        return rival(step)

    def no_bias() -> Rival:
        torch.manual_seed(0)
        bare = BeitForMaskedImageModeling(replace(config, relative_position_bias="none")).to(device)
        return rival(Step(bare, batch, dtype), same=False)

    masked = batch.labels.shape[0] // case.batch_size
    return Comparison(
        group=f"options of our own step: {'toy' if case.tiny else f'BEiT-{case.size} plus'}, "
        f"{config.image_hw[0]} px, B={case.batch_size}, {case.dtype}",
        rivals={
            OURS: lambda: rival(fresh()),
            "beit_fast, CUDA graph": lambda: rival(captured(fresh())),
            "beit_fast, compiled blocks": compiled,
            "beit_fast, SDPA attention": sdpa,
            "beit_fast, gradient checkpointing": checkpointing,
            "beit_fast, no position bias": no_bias,
        },
        shapes={"B": case.batch_size, "N": config.num_patches + 1, "M": batch.labels.shape[0], "D": config.width},
        dtype=case.dtype,
        flops=3 * case.batch_size * forward_flops(config, masked),
        images=case.batch_size,
        tolerance=1e-5 if case.dtype == "float32" else 1e-2,
    )


@pytest.mark.parametrize("rival", RIVALS)
def test_step(in_turns, case, rival):
    in_turns(case, lambda: compare(case), rival, case.budget_s)
