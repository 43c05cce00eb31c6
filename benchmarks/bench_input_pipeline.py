"""Two views and a mask per image: beit_fast's CPU path beside Pillow and DALI pipelines, by CPU time and by the clock.

    pytest benchmarks/bench_input_pipeline.py --benchmark-only

All run in one process on JPEG files of 500 x 375 pixels (quality 90; crops of the committed photographs: about half
the bytes of an average ImageNet file, so decoding weighs less than there). By CPU time, what threads work ahead counts
too, and the machine may be busy; by the clock, two threads for DALI and beit_fast, one for Pillow, after queues have
been drained. Their random draws differ, so what is compared first is what a batch is: shapes, ranges, masks.
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
from benchmarks.baselines.input_pipelines import Batch, dali_pipeline, pil_pipeline
from benchmarks.harness import OURS, Comparison, Implementation, Unavailable

THREADS = min(2, os.cpu_count() or 1)
QUEUE = 3  # batches that any of them has made ahead at most
LESS_WORK = "DALI, uint8 without colour (less work)"


@dataclass(frozen=True)
class Case:
    clock: str
    batch_size: int
    files: int
    batches: int = 4
    """In one call."""
    budget_s: float = 20.0


def cases(scale: Any) -> dict[str, Case]:
    size, files = scale.pick(tiny=(4, 8), cpu=(16, 256), gpu=(64, 512), full=(32, 256))
    return {clock: Case(clock, size, files, budget_s=20.0) for clock in ("cpu", "wall")}


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


def ours(files: list[str], batch_size: int, jitter_center: Any) -> Callable[[], Batch]:
    source = open_source(Path(files[0]).parent)
    views = PretrainLoader(
        source, BlockwiseMasking((14, 14), 75), CropSampler(), seed=0, threads=THREADS, jitter_center=jitter_center
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


def dali(files: list[str], batch_size: int, colour: bool) -> Callable[[], Batch]:
    try:
        return dali_pipeline(files, batch_size, THREADS, colour)
    except ModuleNotFoundError:
        raise Unavailable("DALI is not installed") from None


PIPELINES: dict[str, Callable[[list[str], int], Callable[[], Batch]]] = {
    OURS: lambda files, size: ours(files, size, "view"),
    "beit_fast, contrast about the whole image": lambda files, size: ours(files, size, "image"),
    "Pillow, official order": lambda files, size: pil_pipeline(files, size, True),
    "Pillow, colour after the crop": lambda files, size: pil_pipeline(files, size, False),
    "DALI": lambda files, size: dali(files, size, True),
    LESS_WORK: lambda files, size: dali(files, size, False),
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
        batch = PIPELINES[name](files, case.batch_size)
        check(name, batch(), case.batch_size)

        def run() -> None:
            for _ in range(case.batches):
                batch()

        def drain() -> None:
            for _ in range(QUEUE):
                batch()

        threads = 1 if name.startswith("Pillow") else THREADS
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
