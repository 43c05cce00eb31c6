"""`beit-fast predict` and `segment`: what a fine-tuned model sees in images."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import torch
from tyro.conf import Positional, arg

from beit_fast.cli.options import errors_in_one_line, fail, output_names, parse
from beit_fast.data import reading
from beit_fast.data.arrays.statistics import normalization_of
from beit_fast.data.classification import centre_view
from beit_fast.data.screening import Rejection
from beit_fast.train.config import RunConfig
from beit_fast.train.distributed.world import resolve_device
from beit_fast.train.evaluation.classifiers import Classifier, open_classifier
from beit_fast.train.evaluation.segmentors import open_segmentor
from beit_fast.train.precision import DTYPES, precision_of
from beit_fast.visualize.segmentations import overlay, overlay_sheet

Image = TypeVar("Image")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where and how precisely a model runs."""

    device: str = "auto"
    """`auto`: cuda where there is one, else cpu."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast type."""


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions(DeviceOptions):
    """How images are shown to the classifier."""

    image_size: int | None = None
    """Pixels, in place of the classifier's own size; position tables are resized."""
    crop_share: float | None = None
    """Share of the shorter side in the centre crop, in place of the classifier's own."""
    normalization: Literal["own", "imagenet", "half"] = "own"
    """Mean and standard deviation of the pixels: the classifier's own (0.5 where its file names none), or these."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ClassifierOptions):
    """The five likeliest classes of images.

    beit-fast predict runs/finetune_imagenet_base dog.jpg cat.jpg
    beit-fast predict runs/finetune_imagenet_base photos --json > classes.jsonl
    """

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = ""
    """A fine-tuning run, or a file or folder of weights (this library, the official code, timm, transformers)."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE")] = ()
    """Image files, and folders of them."""
    top: int = 5
    """Classes to name."""
    json: bool = False
    """Print a JSON object per image: its path, and names and shares of its classes."""
    value_range: tuple[float, float] | None = None
    """Values of float and 32-bit pixels that are black and white, as in training; without it they are refused."""


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(DeviceOptions):
    """The class of every pixel, as colours over images.

    beit-fast segment runs/segment_ade20k_base street.jpg --output-dir pictures
    """

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = ""
    """A segmentation run, or a file of weights (this library, the official code, transformers)."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE")] = ()
    """Image files."""
    output_dir: Path = Path()
    """Where to write <image>_segments.png, and <image>_legend.png with the image beside it and the names of colours."""
    value_range: tuple[float, float] | None = None
    """Values of float and 32-bit pixels that are black and white, as in training; without it they are refused."""
    opacity: float = 0.5
    """Of the colours."""
    ratios: tuple[float, ...] = (1.0,)
    """Scales of the image whose class shares are averaged."""
    flip: bool = False
    """Average with the mirrored image, too."""
    windows_per_batch: int = 4
    """Windows that go through the model at once."""


def predict_command(arguments: Sequence[str]) -> int:
    """Print the five likeliest classes of each image; returns 1 where an image cannot be read."""
    chosen = parse(PredictOptions(), arguments, "beit-fast predict")
    if not chosen.images:
        fail("predict takes a checkpoint and images: beit-fast predict CHECKPOINT IMAGE...", code=2)
    with errors_in_one_line():
        classifier, device = open_prepared(chosen.checkpoint, chosen), resolve_device(chosen.device)
    model = classifier.model.to(device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (classifier.mean, classifier.std))
    unread: list[Path] = []

    def view_of(path: Path) -> torch.Tensor | str:
        value_range = chosen.value_range or classifier.value_range
        return read_view(path, classifier.image_size, classifier.crop_share, value_range, classifier.channels)

    for path, view in readable(chosen.images, view_of, unread):
        with torch.no_grad(), autocast(chosen, device):
            shares = model(((view.to(device) - mean) / std)[None]).float().softmax(-1)[0].cpu()
        most = shares.topk(min(chosen.top, len(shares)))
        named = [(classifier.classes[n], share) for share, n in zip(*(v.tolist() for v in most), strict=True)]
        if chosen.json:
            print(json.dumps({"image": str(path), "classes": [{"name": n, "share": s} for n, s in named]}), flush=True)
        else:
            print("\n".join([str(path), *(f"  {100 * share:6.2f} %  {name}" for name, share in named)]))
    return int(bool(unread))


def segment_command(arguments: Sequence[str]) -> int:
    """Write a coloured overlay of each image; returns 1 where an image cannot be read."""
    from PIL import Image as Pillow

    chosen = parse(SegmentOptions(), arguments, "beit-fast segment")
    if not chosen.images:
        fail("segment takes a checkpoint and images: beit-fast segment CHECKPOINT IMAGE...", code=2)
    with errors_in_one_line():
        if not 0 <= chosen.opacity <= 1:
            raise ValueError(f"--opacity must be in [0, 1], got {chosen.opacity}")
        segmentor, device = open_segmentor(chosen.checkpoint), resolve_device(chosen.device)
        inference = replace(
            segmentor.inference, ratios=chosen.ratios, flip=chosen.flip, windows_per_batch=chosen.windows_per_batch
        )
        names = dict(zip(chosen.images, output_names(chosen.images), strict=True))
        chosen.output_dir.mkdir(parents=True, exist_ok=True)
    model, count = segmentor.model.to(device), len(segmentor.classes)
    unread: list[Path] = []
    for path, picture in readable(chosen.images, lambda path: read_picture(path, chosen.value_range), unread):
        with autocast(chosen, device):
            classes = inference.classes(model, torch.from_numpy(picture).to(device)).cpu().numpy()
        shares = np.bincount(classes.ravel(), minlength=count) / classes.size
        largest = [number for number in np.argsort(-shares, kind="stable")[:5].tolist() if shares[number]]
        target = chosen.output_dir / f"{names[path]}_segments.png"
        Pillow.fromarray(overlay(picture, classes, count, chosen.opacity)).save(target)
        legend = overlay_sheet(picture, classes, segmentor.classes, chosen.opacity)
        legend.save(target.with_name(f"{names[path]}_legend.png"))
        print(f"{target}: " + ", ".join(f"{100 * shares[n]:.1f} % {segmentor.classes[n]}" for n in largest))
    return int(bool(unread))


def autocast(options: DeviceOptions, device: torch.device) -> torch.autocast:
    """Autocast of the precision asked for; none where it is fp32."""
    dtype = DTYPES[precision_of(RunConfig(precision=options.precision), device)]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def open_prepared(path: str, options: ClassifierOptions) -> Classifier:
    """The classifier, with what the command line says in place of its own size, crop and normalisation."""
    own = open_classifier(path, options.image_size)
    mean, std = own.mean, own.std
    if options.normalization != "own":
        mean, std = normalization_of(options.normalization, own.channels)
    share = own.crop_share if options.crop_share is None else options.crop_share
    if not 0 < share <= 1:
        raise ValueError(f"--crop-share must be in (0, 1], got {share}")
    return replace(own, crop_share=share, mean=mean, std=std)


def readable(
    paths: Sequence[Path], read: Callable[[Path], Image | str], unread: list[Path]
) -> Iterator[tuple[Path, Image]]:
    """Each path, of a folder its files, with what `read` makes of it.

    Where that is a reason (str), it is printed and the path added to `unread`.
    """
    files = [sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path] for path in paths]
    for path in itertools.chain(*files):
        image = read(path)
        if isinstance(image, str):
            print(f"error: {path}: {image}", file=sys.stderr, flush=True)
            unread.append(path)
        else:
            yield path, image


def read_picture(
    path: Path, value_range: tuple[float, float] | None = None, channels: int | None = None
) -> np.ndarray | str:
    """Pixels of an image file, uint8 (H, W, 3) or float32 (H, W, `channels`), or why there are none."""
    picture = reading.read_picture(path, value_range, channels)
    return picture.reason if isinstance(picture, Rejection) else picture


def read_view(
    path: Path, image_size: int | tuple[int, int], crop_share: float,
    value_range: tuple[float, float] | None = None, channels: int | None = None,
) -> torch.Tensor | str:  # fmt: skip
    """The central view (C, H, W) of an image file, float32 in [0, 1], or why there is none."""
    picture = read_picture(path, value_range, channels)
    if isinstance(picture, str):
        return picture
    view = centre_view(picture, image_size, crop_share).permute(2, 0, 1)
    return view.float() / 255 if view.dtype == torch.uint8 else view
