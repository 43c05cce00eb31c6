"""`beit-fast verify`: published numbers beside those that released or own weights give here."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import nn
from tyro.conf import Positional, arg

from beit_fast.cli.evaluate import EvaluateOptions, EvaluationDataConfig, measure_classifier, measure_segmentor
from beit_fast.cli.options import did_you_mean, errors_in_one_line, fail, nearest, parse
from beit_fast.cli.predict import DeviceOptions
from beit_fast.data.classification import EvaluationLoader, default_crop_share
from beit_fast.data.screening import BadImages
from beit_fast.data.sources import open_source
from beit_fast.models import Beit, BeitForSemanticSegmentation
from beit_fast.models.checkpoints import load_checkpoint
from beit_fast.tokenizers import load_tokenizer
from beit_fast.train.distributed.world import World, end_world, start_world
from beit_fast.train.evaluation.classifiers import local_source, open_classifier
from beit_fast.train.evaluation.published import PUBLISHED, SCALES, Published
from beit_fast.train.evaluation.segmentors import open_segmentor
from beit_fast.version import __version__


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(DeviceOptions):
    """Measure weights and set the result beside the published one; without a name, list what is published.

    beit-fast verify beit_base_patch16_224_pt22k_ft22kto1k --data.path /data/imagenet
    beit-fast verify upernet_beit_base_640 --weights upernet_beit_base.pth --data.path /data/ADEChallengeData2016
    beit-fast verify dalle --data.path /data/imagenet/val
    """

    name: Annotated[Positional[str], arg(metavar="NAME")] = ""
    """A published result; without one they are listed."""
    weights: str | None = None
    """A file, a run, a folder, a name of timm or hf-hub:owner/name; None fetches the released weights."""
    data: EvaluationDataConfig = dataclass_field(default_factory=EvaluationDataConfig)
    batch_size: int = 64
    """Images per forward pass."""
    output: Path | None = None
    """Where to write the record; None: verify_NAME.json in this folder."""


def verify_command(arguments: Sequence[str]) -> int:
    """Print hash, load report, and published beside measured; write them down."""
    chosen = parse(VerifyOptions(), arguments, "beit-fast verify")
    if not chosen.name:
        print("\n".join(_listed(name, entry) for name, entry in PUBLISHED.items()))
        return 0
    entry = PUBLISHED.get(chosen.name)
    if entry is None:
        hint = did_you_mean(nearest(chosen.name, list(PUBLISHED))) or "beit-fast verify lists them"
        fail(f"no result is published as {chosen.name!r}; {hint}", code=2)
    weights = chosen.weights or entry.weights
    with errors_in_one_line():
        if weights is None:
            raise ValueError(f"no weights are released for {chosen.name}; give --weights FILE or RUN")
        if chosen.data.path is None and entry.kind != "probe":
            raise ValueError(
                "--data.path is missing; give the validation images that the published number was measured on"
            )
        world = start_world(chosen.device)
        try:
            files, measured, images = MEASURES[entry.kind](chosen, entry, weights, world)
        finally:
            end_world(world)
        if world.is_main:
            _report(chosen, entry, weights, files, measured, images)
    return 0


def _listed(name: str, entry: Published) -> str:
    numbers = ", ".join(f"{metric} {value:g}" for metric, value in entry.metrics.items())
    return f"  {name:<40} {numbers} ({entry.source}){'' if entry.weights is None else f'; weights {entry.weights}'}"


def _report(
    chosen: VerifyOptions, entry: Published, weights: str, files: Mapping[str, str], measured: Mapping[str, Any],
    images: int | None,
) -> None:  # fmt: skip
    print(f"{chosen.name}: {entry.source}" + (f", {images} images of {chosen.data.path}" if images else ""))
    for metric, published in entry.metrics.items():
        value = measured[metric]
        print(f"  {metric:<24} published {published:g}, measured {value:.4f}, difference {value - published:+.4f}")
    record = {
        "name": chosen.name, "source": entry.source, "weights": weights, "sha256": dict(files),
        "published": entry.metrics, "measured": dict(measured), "images": images, "data": chosen.data.path,
        "device": chosen.device, "precision": chosen.precision, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"beit_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    path = chosen.output or Path(f"verify_{chosen.name}.json")
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")


def _hashes(source: Path) -> dict[str, str]:
    """SHA-256 of every file of weights, printed."""
    root = source / "model" if (source / "model" / "config.json").is_file() else source
    files = [root] if root.is_file() else sorted(p for p in root.iterdir() if p.suffix in WEIGHTS)
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        print(f"{path}: sha256 {found[path.name]}")
    return found


WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".pkl")
Measured = tuple[dict[str, str], Mapping[str, Any], int | None]


def _loaded(model: nn.Module, source: Path, world: World) -> dict[str, str]:
    """Print what becomes of each tensor; returns the files' hashes."""
    if not world.is_main:
        return {}
    hashes = _hashes(source)
    load_checkpoint(model, source / "model" if (source / "model" / "config.json").is_file() else source)
    return hashes


def _evaluate_options(chosen: VerifyOptions, entry: Published, source: Path) -> EvaluateOptions:
    segments = entry.kind == "segmentation"
    return EvaluateOptions(
        checkpoint=str(source), data=chosen.data, batch_size=chosen.batch_size, device=chosen.device,
        precision=chosen.precision, image_size=None if segments else entry.image_size,
        crop_share=default_crop_share(entry.image_size), normalization=entry.normalization,
        ratios=SCALES if entry.multi_scale else (1.0,), flip=entry.multi_scale,
        reduce_zero_label=True if segments else None,
    )  # fmt: skip


def _classifier(chosen: VerifyOptions, entry: Published, weights: str, world: World) -> Measured:
    source = local_source(weights)
    with contextlib.redirect_stdout(io.StringIO()):  # the report is printed once
        model: Beit = open_classifier(source, entry.image_size).model
    hashes = _loaded(model, source, world)
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = measure_classifier(_evaluate_options(chosen, entry, source), world, by_order=True)[0].metrics()
    return hashes, metrics, int(metrics["validation_images"])


def _segmentation(chosen: VerifyOptions, entry: Published, weights: str, world: World) -> Measured:
    source = local_source(weights)
    with contextlib.redirect_stdout(io.StringIO()):
        model: BeitForSemanticSegmentation = open_segmentor(source).model
    hashes = _loaded(model, source, world)
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = measure_segmentor(_evaluate_options(chosen, entry, source), world)[0].metrics()
    return hashes, metrics, int(metrics["validation_images"])


def _tokenizer(chosen: VerifyOptions, entry: Published, weights: str, world: World) -> Measured:
    """Mean absolute error of reconstructions of central views in [0, 1]."""
    tokenizer = load_tokenizer(weights, device=world.device, decoder=True)
    assert chosen.data.path is not None
    source = open_source(chosen.data.path)
    views = EvaluationLoader(
        source, np.zeros(len(source), np.int64), image_size=entry.image_size, mean=(0.0,) * 3, std=(1.0,) * 3,
        device=world.device, threads=chosen.data.threads, decoder=chosen.data.decoder,
        bad_images=BadImages(len(source), None, chosen.data.max_bad_share),
    )  # fmt: skip
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    try:
        with torch.no_grad():
            for batch in views.batches(chosen.batch_size, world.rank, world.size):
                pixels = batch.images.clamp(0, 1)
                error = (tokenizer.decode(tokenizer.encode(pixels)).float() - pixels).abs()
                sums += torch.stack([error.double().mean((1, 2, 3)).sum(), sums.new_tensor(len(pixels))])
    finally:
        views.close()
    total, count = world.sum(sums).tolist()
    print(f"{weights}: sha256 {tokenizer.sha256}, {sum(p.numel() for p in tokenizer.parameters()):,} parameters")
    return {weights: str(tokenizer.sha256)}, {"mae": total / count}, int(count)


def _probe(chosen: VerifyOptions, entry: Published, weights: str, world: World) -> Measured:
    """The measurement that a finished linear_probe run left."""
    path = Path(weights) / "complete.json"
    if not path.is_file():
        raise ValueError(
            f"{weights} is no finished run of linear_probe; make one: beit-fast train linear_probe --weights MODEL"
        )
    metrics: dict[str, Any] = json.loads(path.read_text())["metrics"]
    if "best_layer" not in metrics:
        raise ValueError(f"{weights} is no run of linear_probe; make one: beit-fast train linear_probe --weights MODEL")
    return {}, metrics, int(metrics["validation_images"])


MEASURES = {"classifier": _classifier, "segmentation": _segmentation, "tokenizer": _tokenizer, "probe": _probe}
