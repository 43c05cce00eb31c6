"""`beit-fast evaluate`: how often a classifier is right on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from beit_fast.cli.options import errors_in_one_line, fail, parse
from beit_fast.cli.predict import ClassifierOptions, autocast, open_prepared
from beit_fast.data.classification import EvaluationLoader
from beit_fast.data.labelled import LabelledImages, builtin_labelled, open_evaluation, with_classes
from beit_fast.data.screening import BadImages
from beit_fast.train.distributed.world import end_world, start_world
from beit_fast.train.evaluation.classification import evaluate_classifier
from beit_fast.train.evaluation.classifiers import Classifier


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
    """Top-1, top-5 and loss of a classifier on labelled images.

    beit-fast evaluate runs/finetune_imagenet_base --data.path /data/imagenet
    """

    checkpoint: Positional[str] = ""
    """A fine-tuning run, or a file or folder of weights (this library, the official code, timm, transformers)."""
    data: EvaluationDataConfig = dataclass_field(default_factory=EvaluationDataConfig)
    batch_size: int = 64
    """Images per forward pass."""
    output_dir: Path | None = None
    """Where to write per_class.tsv and confusion.png."""


def evaluate_command(arguments: Sequence[str]) -> int:
    """`evaluate CHECKPOINT [--data.path ...]`: prints top-1, top-5 and loss; under torchrun on several devices."""
    chosen = parse(EvaluateOptions(), arguments, "beit-fast evaluate")
    if not chosen.checkpoint:
        fail("evaluate takes one checkpoint: beit-fast evaluate CHECKPOINT --data.path DIR", code=2)
    with errors_in_one_line():
        world = start_world(chosen.device)
        try:
            classifier = open_prepared(chosen.checkpoint, chosen)
            images = _images(chosen.data, classifier)
            views = EvaluationLoader(
                images.source, images.labels, image_size=classifier.image_size, crop_share=classifier.crop_share,
                mean=classifier.mean, std=classifier.std, device=world.device, decoder=chosen.data.decoder,
                bad_images=BadImages(len(images), None, chosen.data.max_bad_share), threads=chosen.data.threads,
                value_range=chosen.data.value_range,
            )  # fmt: skip
            try:
                model = classifier.model.to(world.device)
                with autocast(chosen, world.device):
                    evaluation = evaluate_classifier(model, views, classifier.classes, chosen.batch_size, world)
            finally:
                views.close()
        finally:
            end_world(world)
    if world.is_main:
        metrics = evaluation.metrics()
        print(
            f"{chosen.checkpoint}: top-1 {metrics['top1_percent']:.3f} %, top-5 {metrics['top5_percent']:.3f} %, loss "
            f"{metrics['validation_loss']:.4f} nats on {metrics['validation_images']} images of "
            f"{chosen.data.path or 'built-in scenes'} at {classifier.image_size} pixels, crop {classifier.crop_share:g}"
        )
        if chosen.output_dir is not None:
            chosen.output_dir.mkdir(parents=True, exist_ok=True)
            print("\n".join(f"wrote {path}" for path in evaluation.write(chosen.output_dir)))
    return 0


def _images(data: EvaluationDataConfig, classifier: Classifier) -> LabelledImages:
    """Images whose labels are numbered as the classifier's outputs are."""
    if data.path is None:
        images = builtin_labelled("scenes", data.cache_dir, data.builtin_images, data.builtin_size, train=False)
    else:
        images = open_evaluation(data.path)
    return with_classes(images, classifier.classes, data.path or "built-in scenes", data.class_map)
