"""Fine-tuning from files to updated weights: beit_fast's loop beside timm's, on the same images.

    pytest benchmarks/bench_finetune_loop.py --benchmark-only

Both read the same JPEG class folders and do what the fine-tuning recipe says: random resized crop, RandAugment, erasing
with noise, mixup or CutMix, layer-wise decay, AdamW. timm's is its own loader (`create_loader`, one worker process per
core), its own Mixup, its own BEiT and parameter groups; its RandAugment keeps to magnitude 9, because where `mstd0.5`
draws 10 it asks Pillow to posterise to 0 bits, which Pillow refuses. A call is a run of steps, so that what a loader
made ahead while the other ran is a small part of it. `data_wait_share` is the part of the time that the model waited.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.baselines.torchvision_stubs import make_torchvision_importable
from benchmarks.harness import OURS, Comparison, Implementation, Unavailable
from benchmarks.models import CPU_BLOCKS

NAMES = [OURS, "timm"]


@dataclass(frozen=True)
class Case:
    size: str
    image_size: int
    batch: int
    steps: int
    """Steps of one call."""
    tiny: bool
    cut: bool
    """Whether the model has only `CPU_BLOCKS` blocks."""
    device: Any
    folder: Path


def cases(scale: Any) -> dict[str, Any]:
    quick, more, base = ("tiny", 224, 4, 12), ("tiny", 224, 8, 12), ("base", 224, 64, 16)
    full = (base,) if scale.device.type == "cuda" else (more, ("tiny", 224, 16, 8))
    found = scale.pick(tiny=(("tiny", 64, 4, 2),), cpu=(quick,), gpu=(base,), full=full)
    cut = scale.name == "default" and scale.device.type == "cpu"
    return {f"{size}-{px}-{batch}": (size, px, batch, steps, scale.name == "tiny", cut, scale.device)
            for size, px, batch, steps in found}  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 drawn scenes of 320 x 256 pixels in class folders."""
    from PIL import Image

    from beit_fast.data.builtin import render_labelled

    root = tmp_path_factory.mktemp("classes")
    for index in range(240):
        pixels, label = render_labelled(index, 3, 320)
        place = root / "train" / f"{label:02d}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels[:256])).save(place / f"{index}.jpg", quality=90)
    return root


def timed(batches: Iterator[Any], info: dict[str, Any]) -> Iterator[Any]:
    """The batches, and in `info` how long the loop stood waiting for them."""
    while True:
        before = time.perf_counter()
        batch = next(batches)
        info["waited_s"] = info.get("waited_s", 0.0) + time.perf_counter() - before
        yield batch


def run_steps(step: Any, batches: Iterator[Any], info: dict[str, Any], steps: int) -> None:
    began = time.perf_counter()
    for _ in range(steps):
        step(next(batches))
    info["ran_s"] = info.get("ran_s", 0.0) + time.perf_counter() - began
    info["data_wait_share"] = info["waited_s"] / info["ran_s"]


def shape(case: Case) -> dict[str, Any]:
    if case.tiny:
        return {"width": 32, "depth": 2, "num_heads": 2}
    return {"depth": CPU_BLOCKS} if case.cut else {}


def ours(case: Case) -> Implementation:
    from beit_fast.train.config import OptimConfig
    from beit_fast.train.distributed.world import World
    from beit_fast.train.optim import build_optimizer, optimizer_step, set_learning_rate
    from beit_fast.train.schedules import requests_of
    from beit_fast.train.tasks.finetune import ClassifierModelConfig, Finetune, FinetuneConfig, LabelledDataConfig

    config = FinetuneConfig(
        output_dir=case.folder / "run", scratch=True, batch_size=case.batch, batch_per_device=case.batch,
        data=LabelledDataConfig(path=str(case.folder), validate=False, prefetch=4),  # as many as timm's two workers
        model=ClassifierModelConfig(size=case.size, image_size=case.image_size, **shape(case)),  # type: ignore[arg-type]
        optim=OptimConfig(lr=1e-4, clip_grad=None)
    )  # fmt: skip
    task, world = Finetune(config), World(0, 1, torch.device(case.device))
    model = task.build(world).train()
    optimizer = build_optimizer(task.parameter_groups(model, 0.05), config.optim)
    info: dict[str, Any] = {}
    requests = requests_of(0, 10**6, task.num_samples() // case.batch, config, 0, 1)
    batches = timed(iter(task.batches(requests)), info)
    one, count = torch.ones((), device=world.device), torch.tensor(float(case.batch), device=world.device)
    state = {"step": 0}

    def step(batch: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            ready = task.prepare(batch, state["step"])
        with torch.autocast(world.device.type, torch.bfloat16, enabled=world.device.type == "cuda"):
            output = task.loss(model, ready, count)
        output.loss.backward()
        set_learning_rate(optimizer, 1e-4)
        optimizer_step(optimizer, one, None)
        state["step"] += 1

    return Implementation(lambda: run_steps(step, batches, info, case.steps), info=info)


def timms(case: Case) -> Implementation:
    make_torchvision_importable()
    try:
        from timm.data import Mixup, create_dataset, create_loader
        from timm.loss import SoftTargetCrossEntropy
        from timm.models.beit import Beit
        from timm.optim import param_groups_layer_decay
    except ImportError as error:
        raise Unavailable(f"timm is not installed ({error})") from error
    from beit_fast.models import BeitConfig
    from benchmarks.baselines.libraries import timm_beit

    config = BeitConfig.from_preset(case.size, image_size=case.image_size, drop_path_rate=0.1, **shape(case))  # type: ignore[arg-type]
    model = timm_beit(config.for_classification(24))
    assert isinstance(model, Beit)
    device = torch.device(case.device)
    model.to(device).train()
    dataset = create_dataset("", root=str(case.folder / "train"), is_training=True)
    loader = create_loader(
        dataset, (3, case.image_size, case.image_size), case.batch, is_training=True, use_prefetcher=False,
        re_prob=0.25, re_mode="pixel", auto_augment="rand-m9-inc1", interpolation="bicubic",
        num_workers=len(os.sched_getaffinity(0)), device=device, persistent_workers=True
    )  # fmt: skip
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=24)
    groups = param_groups_layer_decay(model, 0.05, layer_decay=0.65)
    optimizer, loss_of = torch.optim.AdamW(groups, lr=1e-4, fused=True), SoftTargetCrossEntropy()
    info: dict[str, Any] = {}

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = timed(endless(), info)

    def step(batch: Any) -> None:
        images, targets = mixup(batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True))
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(model(images), targets)
        loss.backward()
        optimizer.step()

    return Implementation(lambda: run_steps(step, batches, info, case.steps), info=info)


def comparison(case: Case) -> Comparison:
    cut = f" cut to {CPU_BLOCKS} blocks" if case.cut else ""
    return Comparison(
        group=f"fine-tuning, files to weights: BEiT-{case.size}{cut}, {case.image_size} px, batch {case.batch}",
        implementations={OURS: lambda: ours(case), "timm": lambda: timms(case)},
        shapes={"batch": case.batch, "image_size": case.image_size, "steps": case.steps},
        dtype="bfloat16" if torch.device(case.device).type == "cuda" else "float32",
        images=case.batch * case.steps,
    )


@pytest.mark.parametrize("name", NAMES)
def test_loop(interleaved: Any, case: Any, name: str, folder: Path) -> None:
    made = Case(*case, folder)
    interleaved(("loop", case), lambda: comparison(made), name, 20.0)
