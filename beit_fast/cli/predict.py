"""`python -m beit_fast evaluate`, `predict` and `segment`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from beit_fast.cli.train import fail, parse
from beit_fast.data.classification import EvaluationLoader, centre_view
from beit_fast.data.decoding import Crop, PilDecoder
from beit_fast.data.labelled import LabelledImages, builtin_labelled, open_evaluation
from beit_fast.data.loader import NORMALIZATION
from beit_fast.data.screening import BadImages, Rejection, TooManyBadImages, screen
from beit_fast.train.config import RunConfig
from beit_fast.train.distributed.world import end_world, resolve_device, start_world
from beit_fast.train.evaluation.classification import evaluate_classifier
from beit_fast.train.evaluation.classifiers import Classifier, open_classifier
from beit_fast.train.evaluation.segmentors import open_segmentor
from beit_fast.train.precision import DTYPES, precision_of
from beit_fast.visualize.segmentations import overlay


@dataclass(frozen=True, kw_only=True)
class EvaluationDataConfig:
    """What to evaluate on."""

    path: str | None = None
    """Folder with `val` in it, class folders, tar shards with .cls entries, or CIFAR-100. None: built-in scenes."""
    builtin_images: int = 1500
    """Scenes where no path is given."""
    builtin_size: int = 64
    """Side of a scene in pixels."""
    cache_dir: str | None = None
    """Where scenes are kept."""
    decoder: Literal["auto", "dali", "pil"] = "auto"
    """Who decodes JPEGs."""
    threads: int | None = None
    """Threads that make views; None: the cores of this process, at most 8."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the images is unreadable."""


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
class EvaluateOptions(ClassifierOptions):
    """Accuracy of a classifier."""

    data: EvaluationDataConfig = dataclass_field(default_factory=EvaluationDataConfig)
    batch_size: int = 64
    """Images per forward pass."""
    output_dir: Path | None = None
    """Where to write per_class.tsv and confusion.png."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ClassifierOptions):
    """The five likeliest classes of images."""


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(DeviceOptions):
    """Classes of every pixel, as colours over images."""

    output_dir: Path = Path()
    """Where to write <image>_segments.png."""
    opacity: float = 0.5
    """Of the colours."""
    ratios: tuple[float, ...] = (1.0,)
    """Scales of the image whose class shares are averaged."""
    flip: bool = False
    """Average with the mirrored image, too."""
    windows_per_batch: int = 4
    """Windows that go through the model at once."""


def evaluate_command(arguments: Sequence[str]) -> int:
    """`evaluate CHECKPOINT [--data.path ...]`: prints top-1, top-5 and loss; under torchrun on several devices."""
    places, options = split_words(arguments)
    chosen: EvaluateOptions = parse(EvaluateOptions(), options)  # type: ignore[type-var]
    if len(places) != 1:
        fail("evaluate takes one checkpoint: python -m beit_fast evaluate CHECKPOINT --data.path DIR", code=2)
    try:
        world = start_world(chosen.device)
        try:
            classifier = _prepared(places[0], chosen)
            images = _images(chosen.data, classifier)
            views = EvaluationLoader(
                images.source, images.labels, image_size=classifier.image_size, crop_share=classifier.crop_share,
                mean=classifier.mean, std=classifier.std, device=world.device, decoder=chosen.data.decoder,
                bad_images=BadImages(len(images), None, chosen.data.max_bad_share), threads=chosen.data.threads,
            )  # fmt: skip
            try:
                model = classifier.model.to(world.device)
                with _autocast(chosen, world.device):
                    found = evaluate_classifier(model, views, classifier.classes, chosen.batch_size, world)
            finally:
                views.close()
        finally:
            end_world(world)
    except (ValueError, OSError, ModuleNotFoundError, TooManyBadImages) as error:
        fail(str(error), code=1)
    if world.is_main:
        metrics = found.metrics()
        print(
            f"{places[0]}: top-1 {metrics['top1_percent']:.3f} %, top-5 {metrics['top5_percent']:.3f} %, loss "
            f"{metrics['validation_loss']:.4f} nats on {metrics['validation_images']} images of "
            f"{chosen.data.path or 'built-in scenes'} at {classifier.image_size} pixels, crop {classifier.crop_share:g}"
        )
        if chosen.output_dir is not None:
            chosen.output_dir.mkdir(parents=True, exist_ok=True)
            print("\n".join(f"wrote {path}" for path in found.write(chosen.output_dir)))
    return 0


def predict_command(arguments: Sequence[str]) -> int:
    """`predict CHECKPOINT IMAGE...`: five likeliest classes of each image; 1 where an image cannot be read."""
    places, options = split_words(arguments)
    chosen: PredictOptions = parse(PredictOptions(), options)  # type: ignore[type-var]
    if len(places) < 2:
        fail("predict takes a checkpoint and images: python -m beit_fast predict CHECKPOINT IMAGE...", code=2)
    try:
        classifier, device = _prepared(places[0], chosen), resolve_device(chosen.device)
    except (ValueError, OSError) as error:
        fail(str(error), code=1)
    model, unread = classifier.model.to(device), 0
    for name in places[1:]:
        view = _view(Path(name), classifier)
        if isinstance(view, str):
            print(f"error: {name}: {view}", file=sys.stderr, flush=True)
            unread += 1
            continue
        with torch.no_grad(), _autocast(chosen, device):
            shares = model(view.to(device)).float().softmax(-1)[0].cpu()
        print(name)
        for share, number in zip(*shares.topk(min(5, len(shares))), strict=True):
            print(f"  {100 * float(share):6.2f} %  {classifier.classes[int(number)]}")
    return 1 if unread else 0


def segment_command(arguments: Sequence[str]) -> int:
    """`segment CHECKPOINT IMAGE...`: a coloured overlay of each image; 1 where an image cannot be read."""
    from PIL import Image

    places, options = split_words(arguments)
    chosen: SegmentOptions = parse(SegmentOptions(), options)  # type: ignore[type-var]
    if len(places) < 2:
        fail("segment takes a checkpoint and images: python -m beit_fast segment CHECKPOINT IMAGE...", code=2)
    try:
        if not 0 <= chosen.opacity <= 1:
            raise ValueError(f"--opacity must be in [0, 1], got {chosen.opacity}")
        segmentor, device = open_segmentor(places[0]), resolve_device(chosen.device)
        inference = replace(
            segmentor.inference, ratios=chosen.ratios, flip=chosen.flip, windows_per_batch=chosen.windows_per_batch
        )
        chosen.output_dir.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        fail(str(error), code=1)
    model, unread, count = segmentor.model.to(device), 0, len(segmentor.classes)
    for name in places[1:]:
        picture = read_picture(Path(name))
        if isinstance(picture, str):
            print(f"error: {name}: {picture}", file=sys.stderr, flush=True)
            unread += 1
            continue
        with _autocast(chosen, device):
            found = inference.classes(model, torch.from_numpy(picture).to(device)).cpu().numpy()
        shares = np.bincount(found.ravel(), minlength=count) / found.size
        largest = [number for number in np.argsort(-shares, kind="stable")[:5].tolist() if shares[number]]
        target = chosen.output_dir / f"{Path(name).stem}_segments.png"
        Image.fromarray(overlay(picture, found, count, chosen.opacity)).save(target)
        print(f"{target}: " + ", ".join(f"{100 * shares[n]:.1f} % {segmentor.classes[n]}" for n in largest))
    return 1 if unread else 0


def split_words(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words in front of the first option, and the options."""
    first = next((place for place, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return list(arguments[:first]), list(arguments[first:])


def _autocast(options: DeviceOptions, device: torch.device) -> torch.autocast:
    dtype = DTYPES[precision_of(RunConfig(precision=options.precision), device)]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _prepared(path: str, options: ClassifierOptions) -> Classifier:
    """The classifier with what the command line says otherwise."""
    found = open_classifier(path, options.image_size)
    mean, std = (found.mean, found.std) if options.normalization == "own" else NORMALIZATION[options.normalization]
    share = found.crop_share if options.crop_share is None else options.crop_share
    if not 0 < share <= 1:
        raise ValueError(f"--crop-share must be in (0, 1], got {share}")
    return Classifier(found.model, found.classes, found.image_size, share, mean, std)


def _images(data: EvaluationDataConfig, classifier: Classifier) -> LabelledImages:
    """Images whose labels are numbered as the classifier's outputs are: by name, or by their order."""
    if data.path is None:
        images = builtin_labelled("scenes", data.cache_dir, data.builtin_images, data.builtin_size, train=False)
    else:
        images = open_evaluation(data.path)
    if set(images.classes) <= set(classifier.classes):
        numbers = np.array([classifier.classes.index(name) for name in images.classes], np.int64)
        return LabelledImages(images.source, numbers[images.labels], classifier.classes)
    if len(images.classes) != len(classifier.classes):
        raise ValueError(
            f"{data.path or 'built-in scenes'} has {len(images.classes)} classes, the classifier has "
            f"{len(classifier.classes)}"
        )
    return LabelledImages(images.source, images.labels, classifier.classes)


def read_picture(path: Path) -> Crop | str:
    """Pixels uint8 (H, W, 3) of an image file, or why there are none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return error.strerror or str(error)
    header = screen(data)
    if isinstance(header, Rejection):
        return header.reason
    picture = PilDecoder().decode([data], np.array([(0, 0, header.height, header.width)], np.int32))[0]
    return picture.reason if isinstance(picture, Rejection) else picture


def read_view(path: Path, image_size: int, crop_share: float) -> torch.Tensor | str:
    """The central view (3, S, S) of an image file, float32 in [0, 1], or why there is none."""
    picture = read_picture(path)
    if isinstance(picture, str):
        return picture
    return centre_view(picture, image_size, crop_share).permute(2, 0, 1).float() / 255


def _view(path: Path, classifier: Classifier) -> torch.Tensor | str:
    """One normalised view (1, 3, S, S), or why there is none."""
    view = read_view(path, classifier.image_size, classifier.crop_share)
    if isinstance(view, str):
        return view
    mean, std = (torch.tensor(values)[:, None, None] for values in (classifier.mean, classifier.std))
    return ((view - mean) / std)[None]
