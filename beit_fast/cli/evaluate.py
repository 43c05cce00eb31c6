"""`beit-fast evaluate`: how often a classifier is right on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Annotated, Literal

import torch
from tyro.conf import Positional, arg

from beit_fast.cli.options import errors_in_one_line, fail, parse
from beit_fast.cli.predict import ClassifierOptions, autocast, open_prepared
from beit_fast.data.classification import EvaluationLoader
from beit_fast.data.labelled import LabelledImages, builtin_labelled, open_evaluation, with_classes
from beit_fast.data.screening import BadImages
from beit_fast.data.segmentation import builtin_segmentation, open_segmentation
from beit_fast.data.segmentation_loader import WholeImages
from beit_fast.train.distributed.world import World, end_world, start_world
from beit_fast.train.evaluation.classification import Evaluation, evaluate_classifier
from beit_fast.train.evaluation.classifiers import Classifier
from beit_fast.train.evaluation.segmentation import SegmentationScores, evaluate_segmentation
from beit_fast.train.evaluation.segmentors import is_segmentor, open_segmentor
from beit_fast.train.tasks.weights import saved_config

IGNORED_LABEL = 255
"""Number, in label files, of pixels that do not count, as in ADE20K."""


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
    class_map: str | None = None
    """File that says which class of the images is which of the classifier, a line each: folder or number, tab, name or
    number of the class; or the folders alone, in the order of the classifier's outputs."""
    value_range: tuple[float, float] | None = None
    """Values of float and 32-bit pixels that are black and white; without it such images are refused."""
    max_bad_share: float = 0.01
    """Stop when more than this share of the images is unreadable."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ClassifierOptions):
    """Top-1, top-5 and loss of a classifier, or mIoU of a segmentation model, on labelled images.

    beit-fast evaluate runs/finetune_imagenet_base --data.path /data/imagenet
    beit-fast evaluate runs/segment_ade20k_base --data.path /data/ADEChallengeData2016 --flip \\
        --ratios 0.5 0.75 1 1.25 1.5 1.75
    """

    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = ""
    """A fine-tuning run, or a file or folder of weights (this library, the official code, timm, transformers)."""
    data: EvaluationDataConfig = dataclass_field(default_factory=EvaluationDataConfig)
    batch_size: int = 64
    """Images per forward pass."""
    output_dir: Path | None = None
    """Where to write per_class.tsv and confusion.png; of a segmentation model segmentations.png."""
    ratios: tuple[float, ...] = (1.0,)
    """Segmentation: scales of the image whose class shares are averaged."""
    flip: bool = False
    """Segmentation: average with the mirrored image, too."""
    reduce_zero_label: bool | None = None
    """Segmentation: in label files 0 is no class, and class k is written as k + 1 (ADE20K); None: as the run has it."""


def evaluate_command(arguments: Sequence[str]) -> int:
    """Print the accuracy on a labelled set; under torchrun on several devices."""
    chosen = parse(EvaluateOptions(), arguments, "beit-fast evaluate")
    if not chosen.checkpoint:
        fail("evaluate takes one checkpoint: beit-fast evaluate CHECKPOINT --data.path DIR", code=2)
    with errors_in_one_line():
        world = start_world(chosen.device)
        try:
            segments = is_segmentor(chosen.checkpoint)
            evaluation, line = (measure_segmentor if segments else measure_classifier)(chosen, world)
        finally:
            end_world(world)
    if world.is_main:
        print(line)
        if chosen.output_dir is not None:
            chosen.output_dir.mkdir(parents=True, exist_ok=True)
            print("\n".join(f"wrote {path}" for path in evaluation.write(chosen.output_dir)))
    return 0


def measure_classifier(chosen: EvaluateOptions, world: World, by_order: bool = False) -> tuple[Evaluation, str]:
    """The evaluation of a classifier, and its line.

    `by_order`: folders in the order of their names are its outputs, as in the official code, if there are as many.
    """
    classifier = open_prepared(chosen.checkpoint, chosen)
    images = _images(chosen.data, classifier, by_order)
    views = EvaluationLoader(
        images.source, images.labels, image_size=classifier.image_size, crop_share=classifier.crop_share,
        mean=classifier.mean, std=classifier.std, device=world.device, decoder=chosen.data.decoder,
        bad_images=BadImages(len(images), None, chosen.data.max_bad_share), threads=chosen.data.threads,
        value_range=chosen.data.value_range or classifier.value_range, channels=classifier.channels,
    )  # fmt: skip
    try:
        model = classifier.model.to(world.device)
        with autocast(chosen, world.device):
            evaluation = evaluate_classifier(model, views, classifier.classes, chosen.batch_size, world)
    finally:
        views.close()
    metrics = evaluation.metrics()
    return evaluation, (
        f"{chosen.checkpoint}: top-1 {metrics['top1_percent']:.3f} %, top-5 {metrics['top5_percent']:.3f} %, loss "
        f"{metrics['validation_loss']:.4f} nats on {metrics['validation_images']} images of "
        f"{chosen.data.path or 'built-in scenes'} at {classifier.image_size} pixels, crop {classifier.crop_share:g}"
    )


def _images(data: EvaluationDataConfig, classifier: Classifier, by_order: bool) -> LabelledImages:
    """Images whose labels are numbered as the classifier's outputs are."""
    if data.path is None:
        images = builtin_labelled("scenes", data.cache_dir, data.builtin_images, data.builtin_size, train=False)
    else:
        images = open_evaluation(data.path)
    if by_order and data.class_map is None and len(images.classes) == len(classifier.classes):
        return LabelledImages(images.source, images.labels, classifier.classes)
    return with_classes(images, classifier.classes, data.path or "built-in scenes", data.class_map)


def measure_segmentor(chosen: EvaluateOptions, world: World) -> tuple[SegmentationScores, str]:
    """The scores of a segmentation model, and their line."""
    segmentor, data = open_segmentor(chosen.checkpoint), chosen.data
    inference = replace(segmentor.inference, ratios=chosen.ratios, flip=chosen.flip)
    if data.path is None:
        images = builtin_segmentation(data.cache_dir, data.builtin_images, data.builtin_size, train=False)
    else:
        zero = chosen.reduce_zero_label
        if zero is None:
            zero = saved_config(chosen.checkpoint).get("data", {}).get("reduce_zero_label", False)
        images = open_segmentation(data.path, False, len(segmentor.classes), zero, IGNORED_LABEL)
    bad_images = BadImages(len(images), None, data.max_bad_share)
    whole = WholeImages(images, decoder=data.decoder, bad_images=bad_images, threads=data.threads)
    try:
        model = segmentor.model.to(world.device)
        with torch.no_grad(), autocast(chosen, world.device):
            scores = evaluate_segmentation(model, whole, inference, segmentor.classes, world, pictures=4)
    finally:
        whole.close()
    metrics = scores.metrics()
    return scores, (
        f"{chosen.checkpoint}: mIoU {metrics['mean_iou_percent']:.3f} %, pixel accuracy "
        f"{metrics['pixel_accuracy_percent']:.3f} %, mean accuracy {metrics['mean_accuracy_percent']:.3f} % on "
        f"{metrics['validation_images']:.0f} images of {data.path or 'built-in scenes'}, windows of "
        f"{inference.window} pixels, ratios {' '.join(map(str, chosen.ratios))}{', flipped too' * chosen.flip}"
    )
