"""`beit-fast embed` and `knn`: features of images by a frozen BEiT, and how well their neighbours classify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from beit_fast.cli.export import open_any
from beit_fast.cli.options import errors_in_one_line, fail, parse
from beit_fast.cli.predict import DeviceOptions, autocast
from beit_fast.data.arrays.statistics import normalization_of
from beit_fast.data.classification import EvaluationLoader
from beit_fast.data.screening import BadImages
from beit_fast.data.sources import open_source
from beit_fast.models import Beit, BeitForMaskedImageModeling
from beit_fast.models.mim import pretrained_backbone
from beit_fast.train.distributed.world import end_world, resolve_device, start_world
from beit_fast.train.evaluation.knn import KnnEvaluation, Tokens, collect_features


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(DeviceOptions):
    """What the features are."""

    tokens: Tokens = "mean"
    """The mean patch token, CLS, or all patch tokens."""
    block: int = -1
    """After which block, counted from 0, negative from the end."""
    batch_size: int = 64
    """Images per forward pass."""
    threads: int | None = None
    """Threads that make views; None: the cores of this process, at most 8."""


@dataclass(frozen=True, kw_only=True)
class EmbedOptions(FeatureOptions):
    """Features of a folder or of shards of images, in the order of their names.

    beit-fast embed runs/pretrain_beit_base photos photos.npy
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")] = ""
    """A run, or a file or folder of weights (this library, the official code, timm, transformers)."""
    path: Annotated[Positional[str], arg(metavar="IMAGES")] = ""
    """Folder or shards of images."""
    output: Annotated[Positional[Path | None], arg(metavar="OUTPUT")] = None
    """A file to write: .npy, with the names in .txt beside it, or .parquet, with columns name and features."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the images is unreadable."""


@dataclass(frozen=True, kw_only=True)
class KnnOptions(FeatureOptions):
    """k-NN accuracy of a model's features on a labelled set with `train` and `val` (DINO's protocol).

    beit-fast knn runs/pretrain_beit_base /data/imagenet
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")] = ""
    """A run, or a file or folder of weights (this library, the official code, timm, transformers)."""
    path: Annotated[Positional[str], arg(metavar="IMAGES")] = ""
    """Folder with `train` and `val` in it, class folders or shards; or CIFAR-100."""
    k: int = 20
    """Neighbours that vote."""


def open_backbone(source: str) -> tuple[Beit, dict[str, Any]]:
    """A BEiT without regard to its head, and the preprocessing of its images; ValueError for a segmentation model."""
    model, preprocessing = open_any(source)
    if isinstance(model, BeitForMaskedImageModeling):
        model = pretrained_backbone(model)
    if not isinstance(model, Beit):
        raise ValueError(f"{source} is a segmentation model; name a pre-training run or a classifier")
    return model, preprocessing


def image_options(model: Beit, preprocessing: dict[str, Any]) -> dict[str, Any]:
    """How the images of a model are read, as loaders take it: mean, std, channels and value range."""
    channels = preprocessing.get("channels") or (None if model.config.in_chans == 3 else model.config.in_chans)
    mean, std = normalization_of("half", channels)
    value_range = preprocessing.get("value_range")
    return {
        "mean": tuple(preprocessing.get("mean") or mean), "std": tuple(preprocessing.get("std") or std),
        "channels": channels, "value_range": None if value_range is None else tuple(value_range),
    }  # fmt: skip


def embed_command(arguments: Sequence[str]) -> int:
    """Write the features of images and their names."""
    chosen = parse(EmbedOptions(), arguments, "beit-fast embed")
    if chosen.output is None or chosen.output.suffix not in (".npy", ".parquet"):
        fail("embed takes a model, images and a file: beit-fast embed RUN FOLDER features.npy (or .parquet)", code=2)
    with errors_in_one_line():
        model, preprocessing = open_backbone(chosen.model)
        source = open_source(chosen.path)
        world = start_world(chosen.device)
        try:
            views = EvaluationLoader(
                source, np.zeros(len(source), np.int64), image_size=model.config.image_hw,
                device=world.device, threads=chosen.threads, crop_share=preprocessing.get("crop_share"),
                bad_images=BadImages(len(source), None, chosen.max_bad_share), **image_options(model, preprocessing),
            )  # fmt: skip
            with autocast(chosen, world.device):
                features, indices = collect_features(
                    model.to(world.device), views, world, chosen.batch_size, chosen.tokens, chosen.block
                )
            views.close()
        finally:
            end_world(world)
        if world.is_main:
            _write(chosen.output, features.numpy(), [source.name(index) for index in indices.tolist()])
            shape = " x ".join(map(str, features.shape))
            print(f"wrote {chosen.output}: {shape}, {chosen.tokens} of block {chosen.block}")
    return 0


def _write(path: Path, features: np.ndarray, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, features)
        path.with_suffix(".txt").write_text("\n".join(names) + "\n")
        return
    import pyarrow
    from pyarrow import parquet

    rows = list(features.reshape(len(features), -1))
    parquet.write_table(pyarrow.table({"name": names, "features": rows}), path)


def knn_command(arguments: Sequence[str]) -> int:
    """Print top-1 and top-5 of the k nearest neighbours."""
    chosen = parse(KnnOptions(), arguments, "beit-fast knn")
    if not chosen.path:
        fail("knn takes a model and labelled images: beit-fast knn RUN FOLDER", code=2)
    with errors_in_one_line():
        if chosen.tokens == "patches":
            raise ValueError("--tokens patches gives no one feature per image: mean or cls")
        model, preprocessing = open_backbone(chosen.model)
        resolve_device(chosen.device)
        world = start_world(chosen.device)
        try:
            evaluation = KnnEvaluation(
                chosen.path, model.config.image_hw, device=world.device, threads=chosen.threads,
                **image_options(model, preprocessing),
            )  # fmt: skip
            with autocast(chosen, world.device):
                found = evaluation.evaluate(
                    model.to(world.device), world, chosen.batch_size, chosen.k, chosen.tokens, chosen.block
                )
            evaluation.close()
        finally:
            end_world(world)
    if world.is_main:
        print(
            f"{chosen.model}: {chosen.k}-NN top-1 {found['knn_top1_percent']:.3f} %, top-5 "
            f"{found['knn_top5_percent']:.3f} % on {found['knn_images']} images of {chosen.path}, {chosen.tokens} of "
            f"block {chosen.block}"
        )
    return 0
