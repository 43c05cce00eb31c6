"""Two views and a mask per image: beit_fast's CPU path beside Pillow and DALI pipelines, per second of CPU time.

    pytest benchmarks/bench_input_pipeline.py --benchmark-only

All run in one process on JPEG files of 500 x 375 pixels (quality 90; crops of the committed photographs: about half
the bytes of an average ImageNet file, so decoding weighs less than there). The table's times are wall clock, with two
threads for DALI and beit_fast and one for Pillow; the comparison is `images_per_cpu_s` in `extra_info`, from rounds in
which all pipelines take turns, and `times_official`, the ratio to the official order with its 95 % interval.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import beit_fast.data
from beit_fast.data import BlockwiseMasking, PretrainViews, Request, ViewSampling, open_source

from .peers_input import dali_pipeline, pil_pipeline

BATCH_SIZE = 32
ROUNDS = int(os.environ.get("BEIT_FAST_BENCH_ROUNDS", "15"))
THREADS = min(2, os.cpu_count() or 1)
NUM_FILES = 256


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("jpeg")
    sources = sorted((Path(beit_fast.data.__file__).parent / "photographs").glob("*.jpg"))
    for number in range(NUM_FILES):
        image = Image.open(sources[number % len(sources)]).convert("RGB")
        width = rng.uniform(0.5, 1.0) * min(image.width, image.height * 4 / 3)
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - 0.75 * width)
        crop = image.resize((500, 375), Image.Resampling.BICUBIC, box=(left, top, left + width, top + 0.75 * width))
        crop.save(folder / f"{number:04d}.jpg", quality=90)
    return sorted(str(path) for path in folder.iterdir())


def ours(files, jitter_center):
    source = open_source(Path(files[0]).parent)
    views = PretrainViews(
        source, BlockwiseMasking((14, 14), 75), ViewSampling(), seed=0, threads=THREADS, jitter_center=jitter_center
    )
    batches = views.batches(
        Request(epoch, np.arange(start, start + BATCH_SIZE))
        for epoch in itertools.count()
        for start in range(0, len(source) - BATCH_SIZE + 1, BATCH_SIZE)
    )

    def batch():
        made = next(batches)
        return made.images, made.token_images, made.mask

    return batch, views.close


PIPELINES = {
    "beit_fast": lambda files: ours(files, "view"),
    "beit_fast, contrast about the whole image": lambda files: ours(files, "image"),
    "Pillow, official order": lambda files: (pil_pipeline(files, BATCH_SIZE, True), None),
    "Pillow, colour after the crop": lambda files: (pil_pipeline(files, BATCH_SIZE, False), None),
    "DALI": lambda files: (dali_pipeline(files, BATCH_SIZE, THREADS, True), None),
    "DALI, uint8 without colour (less work)": lambda files: (dali_pipeline(files, BATCH_SIZE, THREADS, False), None),
}
OFFICIAL = "Pillow, official order"


@pytest.fixture(scope="module")
def pipelines(files):
    random.seed(0)
    made = {name: factory(files) for name, factory in PIPELINES.items()}
    yield {name: batch for name, (batch, _) in made.items()}
    for _, close in made.values():
        if close is not None:
            close()


BATCHES_PER_ROUND = 4  # work done ahead of time falls into another round: what is measured is the steady state


@pytest.fixture(scope="module")
def cpu_seconds(pipelines):
    """CPU seconds per image (R,) of each pipeline, from rounds in which they take turns."""
    seconds = {name: [] for name in pipelines}
    for number in range(ROUNDS + 1):
        for name, batch in pipelines.items():
            _settle()
            start = time.process_time()
            for _ in range(BATCHES_PER_ROUND):
                batch()
            _settle()
            if number:  # the first round builds pipelines and fills queues
                seconds[name].append((time.process_time() - start) / (BATCHES_PER_ROUND * BATCH_SIZE))
    return {name: np.array(values) for name, values in seconds.items()}


def _settle():
    """Wait until no thread of this process works ahead any more."""
    while True:
        before = time.process_time()
        time.sleep(0.05)
        if time.process_time() - before < 0.002:
            return


@pytest.mark.benchmark(group="input pipeline")
@pytest.mark.parametrize("name", PIPELINES)
def test_two_views_and_a_mask(benchmark, pipelines, cpu_seconds, name):
    images, token_images, mask = benchmark.pedantic(pipelines[name], rounds=ROUNDS, warmup_rounds=3)
    assert len(images) == len(token_images) == BATCH_SIZE
    assert tuple(mask.shape) == (BATCH_SIZE, 14, 14)
    own, official = cpu_seconds[name], cpu_seconds[OFFICIAL]
    ratios = official / own
    draws = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    benchmark.extra_info.update(
        batch_size=BATCH_SIZE,
        threads=1 if name.startswith("Pillow") else THREADS,
        images_per_cpu_s=round(float(np.median(1 / own)), 1),
        images_per_cpu_s_spread=[round(float(value), 1) for value in np.quantile(1 / own, [0.25, 0.75])],
        times_official=round(float(np.median(ratios)), 2),
        times_official_95=[round(float(low), 2), round(float(high), 2)],
        pairs=len(ratios),
    )
