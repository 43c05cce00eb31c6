"""Two views and a mask per image: beit_fast beside Pillow and DALI pipelines, by CPU time and by the clock.

    pytest benchmarks/bench_input_pipeline.py --benchmark-only

All run in one process on JPEG files of 500 x 375 pixels (quality 90; crops of the committed photographs: about half
the bytes of an average ImageNet file, so decoding weighs less than there). By CPU time, what threads work ahead counts
too, and the machine may be busy; by the clock, two threads for DALI and beit_fast, one for Pillow, after queues have
been drained. On a GPU beit_fast decodes and resizes there, all cores work, and only the clock counts. Their random
draws differ, so what is compared first is what a batch is: shapes, ranges, masks.
"""

import itertools
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import beit_fast.data
from beit_fast.data import BlockwiseMasking, CropSampler, PretrainLoader, Request, open_source
from beit_fast.data.decoding import has_dali
from benchmarks.baselines.input_pipelines import Batch, dali_pipeline, pil_pipeline
from benchmarks.harness import OURS, Comparison, Implementation, Unavailable

QUEUE = 3  # batches that any of them has made ahead at most
ON_CPU = "beit_fast, decoded and resized on the CPU"
LESS_WORK = "DALI, uint8 without colour (less work)"


@dataclass(frozen=True)
class Case:
    clock: str
    device: torch.device
    batch_size: int
    files: int
    batches: int
    """In one call."""
    budget_s: float = 20.0

    @property
    def threads(self) -> int:
        cores = len(os.sched_getaffinity(0))
        return cores if self.device.type == "cuda" else min(2, cores)


def cases(scale: Any) -> dict[str, Case]:
    on_gpu = (128, 512, 8)
    full, clocks = (on_gpu, ("wall",)) if scale.device.type == "cuda" else ((32, 256, 4), ("cpu", "wall"))
    sizes = scale.pick(tiny=(4, 8, 4), cpu=(16, 128, 2), gpu=on_gpu, full=full)
    return {clock: Case(clock, scale.device, *sizes) for clock in clocks}


@pytest.fixture(scope="session")
def jpeg_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jpeg")


def write_files(folder: Path, count: int) -> list[str]:
    rng = np.random.default_rng(0)
    sources = sorted((Path(beit_fast.data.__file__).parent / "photographs").glob("*.jpg"))
    for number in range(count):
        path = folder / f"{number:04d}.jpg"
        image = Image.open(sources[number % len(sources)]).convert("RGB")
        width = rng.uniform(0.5, 1.0) * min(image.width, image.height * 4 / 3)
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - 0.75 * width)
        crop = image.resize((500, 375), Image.Resampling.BICUBIC, box=(left, top, left + width, top + 0.75 * width))
        if not path.exists():
            crop.save(path, quality=90)
    return sorted(str(path) for path in folder.iterdir())


def ours(files: list[str], case: Case, **options: Any) -> Callable[[], Batch]:
    source, batch_size = open_source(Path(files[0]).parent), case.batch_size
    views = PretrainLoader(
        source,
        BlockwiseMasking((14, 14), 75),
        CropSampler(),
        seed=0,
        threads=case.threads,
        device=case.device,
        **options,
    )
    batches = views.batches(
        Request(epoch, np.arange(start, start + batch_size))
        for epoch in itertools.count()
        for start in range(0, len(source) - batch_size + 1, batch_size)
    )

    def batch() -> Batch:
        made = next(batches)
        return made.images, made.token_images, made.mask

    return batch


def on_cpu(files: list[str], case: Case) -> Callable[[], Batch]:
    if case.device.type != "cuda":
        raise Unavailable("is what beit_fast does without a GPU")
    return ours(files, case, decoder="dali")


def dali(files: list[str], case: Case, colour: bool) -> Callable[[], Batch]:
    try:
        return dali_pipeline(files, case.batch_size, case.threads, colour)
    except ModuleNotFoundError:
        raise Unavailable("DALI is not installed") from None


PIPELINES: dict[str, Callable[[list[str], Case], Callable[[], Batch]]] = {
    OURS: ours,
    ON_CPU: on_cpu,
    "beit_fast, contrast about the whole image": lambda files, case: ours(
        files, case, jitter_center="image", decoder="dali" if has_dali() else "pil"
    ),
    "Pillow, official order": lambda files, case: pil_pipeline(files, case.batch_size, True),
    "Pillow, colour after the crop": lambda files, case: pil_pipeline(files, case.batch_size, False),
    "DALI": lambda files, case: dali(files, case, True),
    LESS_WORK: lambda files, case: dali(files, case, False),
}


def check(name: str, batch: Batch, size: int) -> None:
    """A batch is what pre-training takes: normalised 224 px views, 112 px views in [0, 1], 75 masked of 14 x 14."""
    images, token_images, mask = batch
    assert tuple(mask.shape) == (size, 14, 14)
    assert 60 <= int(mask.sum(dim=(1, 2)).min()) <= int(mask.sum(dim=(1, 2)).max()) == 75
    assert len(images) == len(token_images) == size
    if name != LESS_WORK:
        assert tuple(images.shape) == (size, 3, 224, 224)
        assert tuple(token_images.shape) == (size, 3, 112, 112)
        assert images.dtype == token_images.dtype == torch.float32
        assert -3 < float(images.min()) < -0.5
        assert 0.5 < float(images.max()) < 3
        assert -0.01 <= float(token_images.min()) < 0.2
        assert 0.7 < float(token_images.max()) <= 1.01


def compare(case: Case, folder: Path) -> Comparison:
    files = write_files(folder, case.files)
    random.seed(0)

    def pipeline(name: str) -> Implementation:
        batch = PIPELINES[name](files, case)
        check(name, batch(), case.batch_size)

        def run() -> None:
            for _ in range(case.batches):
                batch()

        def drain() -> None:
            for _ in range(QUEUE):
                batch()

        threads = 1 if name.startswith("Pillow") else case.threads
        return Implementation(run, None, drain if case.clock == "wall" else None, {"pipeline_threads": threads})

    images = case.batch_size * case.batches
    return Comparison(
        group=f"input pipeline, {'CPU time' if case.clock == 'cpu' else 'clock'} for {images} images in batches of "
        f"{case.batch_size}: two views and a mask",
        implementations={name: lambda name=name: pipeline(name) for name in PIPELINES},  # type: ignore[misc]
        shapes={"B": case.batch_size, "files": case.files},
        images=images,
        clock=case.clock,
    )


@pytest.mark.parametrize("name", PIPELINES)
def test_two_views_and_a_mask(interleaved, case, name, jpeg_folder):
    interleaved(case, lambda: compare(case, jpeg_folder), name, case.budget_s)
