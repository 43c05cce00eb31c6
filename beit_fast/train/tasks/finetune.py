"""Fine-tuning for classification (paper, section 2.6 and table 13), and training from scratch for comparison.

From pre-trained weights, with layer-wise learning-rate decay, mixup and CutMix, RandAugment, random erasing. The same
task serves intermediate fine-tuning, higher resolutions and smaller data sets; recipes differ in values only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from beit_fast.data import builtin
from beit_fast.data.augmentation.erasing import RandomErasing, erase
from beit_fast.data.augmentation.mix import Mixing, mix_images, mixed_cross_entropy, paired_order, swap_partners
from beit_fast.data.augmentation.rand_augment import RandAugment
from beit_fast.data.classification import (
    Augmentation,
    ClassificationLoader,
    EvaluationLoader,
    LabelledBatch,
    default_crop_share,
)
from beit_fast.data.labelled import BuiltinSet, LabelledImages, builtin_labelled, open_training, open_validation
from beit_fast.data.loader import NORMALIZATION, Request
from beit_fast.data.screening import BadImages
from beit_fast.data.sources import fingerprint
from beit_fast.models import Beit, BeitConfig
from beit_fast.train.batching import accumulation
from beit_fast.train.config import RunConfig, free
from beit_fast.train.distributed.world import World
from beit_fast.train.evaluation.classification import Evaluation, evaluate_classifier
from beit_fast.train.layer_decay import layer_decay_groups
from beit_fast.train.task import StepOutput, Task
from beit_fast.train.tasks.pretrain import ModelConfig
from beit_fast.train.tasks.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class LabelledDataConfig:
    """Labelled images."""

    path: str | None = None
    """Folder with `train` and `val` in it (class folders or tar shards with .cls entries), or extracted CIFAR-100.
    None: built-in images; a functional check, not ImageNet."""
    validation_path: str | None = free(None)
    """Validation images where they are elsewhere."""
    validate: bool = free(True)
    """Measure accuracy on the validation images, after the last step and every --eval-every steps."""
    num_classes: int | None = None
    """Classes that the data has to have; None takes what it has."""
    builtin: BuiltinSet = "scenes"
    """Without a path: `scenes`, drawn, 24 classes = 6 shapes x 4 textures; `hues`, 6 shapes x 4 hues, of which a model
    without pre-training learns the hues; or `digits` (scikit-learn's)."""
    builtin_images: int = 2000
    """Training scenes."""
    builtin_validation_images: int = free(1500)
    """Validation scenes."""
    builtin_size: int = 64
    """Side of a scene in pixels."""
    builtin_seed: int = 0
    """Which scenes are drawn for training; those for validation are always the same."""
    cache_dir: str | None = free(None)
    """Where scenes are kept; None: $BEIT_FAST_CACHE, or ~/.cache/beit_fast."""
    normalization: Literal["imagenet", "half"] = "imagenet"
    """Mean and standard deviation of the pixels; those of the pre-training."""
    crop_share: float | None = None
    """Share of the shorter side that evaluation crops; None: 0.875 below 384 pixels, 1 from there on."""
    max_bad_share: float = free(0.01)
    """Stop when more than this share of the images is unreadable; they are listed in bad_files.tsv."""
    decoder: Literal["auto", "dali", "pil"] = free("auto")
    """Who decodes JPEGs."""
    threads: int | None = free(None)
    """Threads that make views; None: the cores of this process, at most 8."""
    prefetch: int = free(2)
    """Batches made ahead."""


@dataclass(frozen=True, kw_only=True)
class ClassifierModelConfig(ModelConfig):
    """The BEiT to fine-tune; size and preset are those of its weights."""

    global_pool: Literal["avg", "token"] = "avg"
    """What the head reads: the mean of the patch tokens, or the CLS token."""
    compile: Literal["none", "default", "cuda-graph"] = free("none")
    """torch.compile of the model; `cuda-graph` replays the compiled kernels without launching them one by one."""

    def classifier(self, num_classes: int) -> BeitConfig:
        """The model's configuration as a classifier; ValueError where it cannot be."""
        return self.architecture(vocab_size=8192).for_classification(num_classes, global_pool=self.global_pool)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is random about the training images (paper, table 13)."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random crop, as a share of the image."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the random crop."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip."""
    rand_augment: float = 9.0
    """Magnitude of RandAugment, of 10 (two operations, standard deviation 0.5, as timm); 0 leaves it out."""
    erasing: float = 0.25
    """Share of the images that lose a rectangle to noise."""
    mixup: float = 0.8
    """Alpha of mixup; 0 leaves it out."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0 leaves it out."""
    smoothing: float = 0.1
    """Label smoothing."""
    repeats: int = 1
    """Views of each image in a batch (repeated augmentation); an epoch then sees 1/repeats of the images."""

    def views(self) -> Augmentation:
        rand_augment = RandAugment(magnitude=self.rand_augment) if self.rand_augment else None
        erasing = RandomErasing(probability=self.erasing) if self.erasing else None
        return Augmentation(self.scale, self.ratio, self.flip_probability, rand_augment, erasing, self.repeats)

    def mixing(self) -> Mixing:
        return Mixing(mixup_alpha=self.mixup, cutmix_alpha=self.cutmix)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """Fine-tuning for classification."""

    weights: str | None = None
    """Weights to start from: a run folder of pre-training (its newest checkpoint), or a file of the official code, timm
    or transformers."""
    scratch: bool = False
    """Start from random weights on purpose."""
    layer_decay: float = 0.65
    """Learning rate of a layer over that of the layer above it; 1 trains all layers alike."""
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    model: ClassifierModelConfig = field(default_factory=ClassifierModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


class Finetune(Task):
    """Classify images with a BEiT; leaves classifier, per-class table and confusion picture in the run folder."""

    name = "finetune"
    can_shard = True

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.views: ClassificationLoader | None = None
        self.validation_views: EvaluationLoader | None = None
        self.bad_images: BadImages | None = None
        self.evaluation: Evaluation | None = None

    def build(self, config: RunConfig, world: World) -> nn.Module:
        c, data = self.config, self.config.data
        if c.weights is None and not c.scratch and data.path is not None:
            raise ValueError("--weights is missing: fine-tuning starts from pre-trained weights; --scratch does not")
        if c.weights is not None and c.scratch:
            raise ValueError("--weights and --scratch contradict each other; give one of them")
        if not 0.0 <= c.augment.smoothing < 1.0:
            raise ValueError(f"--augment.smoothing must be in [0, 1), got {c.augment.smoothing}")
        self.world, self.mixing = world, c.augment.mixing()
        if self.mixing.active:
            check_pairs(c, world)
            self.order = paired_order(c.batch_size)
        self.training, self.validation = open_data(data)
        self.classes = self.training.classes
        folder = c.output_dir / "bad_files.tsv" if c.output_dir.is_dir() else None
        self.bad_images = BadImages(len(self.training), folder, data.max_bad_share)
        size = c.model.image_size
        mean, std = NORMALIZATION[data.normalization]
        self.views = ClassificationLoader(
            self.training.source, self.training.labels, c.augment.views(), seed=c.seed, image_size=size, mean=mean,
            std=std, device=world.device, decoder=data.decoder, bad_images=self.bad_images, threads=data.threads,
            prefetch=data.prefetch,
        )  # fmt: skip
        if self.validation is not None:
            self.validation_views = evaluation_views(data, self.validation, size, world.device)
        torch.manual_seed(c.seed)  # whatever was drawn above, the initial weights are those of the seed
        model = Beit(c.model.classifier(len(self.classes)))
        if c.weights is not None:
            load_weights(model, c.weights, verbose=world.is_main)
        model.set_grad_checkpointing(c.model.grad_checkpointing)
        model = model.to(world.device)
        if c.model.compile != "none":
            model.compile(mode="reduce-overhead" if c.model.compile == "cuda-graph" else None)
        return model

    def num_samples(self) -> int:
        return len(self.training)

    def identity(self) -> dict[str, Any]:
        return {"data": fingerprint(self.training.source), "classes": len(self.classes)}

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        assert isinstance(model, Beit)
        return layer_decay_groups(model, weight_decay, self.config.layer_decay, model.config.depth)

    def batches(self, requests: Iterator[Request]) -> Iterator[LabelledBatch]:
        assert self.views is not None
        return self.views.batches(map(self._paired, requests))

    def _paired(self, request: Request) -> Request:
        """The same samples of the epoch, with the partners of mixup side by side."""
        if not self.mixing.active:
            return request
        step, place = np.divmod(request.positions, self.config.batch_size)
        return Request(request.epoch, step * self.config.batch_size + self.order[place])

    def num_targets(self, batch: LabelledBatch) -> int:
        return len(batch)

    def prepare(self, batch: LabelledBatch, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
        """Images erased and mixed, labels, drop-path keys, and the weight of the own label."""
        images = batch.images
        if batch.rectangles is not None:
            images = erase(images, batch.rectangles, batch.sample_keys)
        if not self.mixing.active:
            return images, batch.labels, batch.sample_keys, 1.0
        mix = self.mixing.sample(self.config.seed, step, (images.shape[-2], images.shape[-1]))
        lam = torch.full((), mix.lam, device=images.device)
        return mix_images(images, mix), batch.labels, batch.sample_keys, lam

    def loss(
        self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor | float], num_targets: Tensor
    ) -> StepOutput:
        images, labels, keys, lam = batch
        logits = model(images, keys)
        losses = mixed_cross_entropy(logits, labels, lam, self.config.augment.smoothing)
        # Of a mixed image the class with the larger share counts.
        dominant = torch.where(lam >= 0.5, labels, swap_partners(labels)) if isinstance(lam, Tensor) else labels
        correct = (logits.argmax(-1) == dominant).sum()
        return StepOutput(
            losses.sum() / num_targets, {"num_correct": correct, "num_images": torch.ones_like(keys).sum()}
        )

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        return {"train_top1_percent": 100 * sums["num_correct"] / sums["num_images"]}

    def counters(self) -> dict[str, float]:
        return {} if self.bad_images is None else {"bad_images": len(self.bad_images)}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Top-1, top-5 and loss on the validation images, by the averaged weights where the run keeps them."""
        if self.validation_views is None:
            return {}
        views, batch_size = self.validation_views, self.config.batch_per_device
        self.evaluation = evaluate_classifier(model, views, self.classes, batch_size, self.world)
        bad = {"bad_validation_images": float(len(views.bad_images))} if len(views.bad_images) else {}
        return self.evaluation.metrics() | bad

    def finish(self, model: nn.Module, run_dir: Path) -> None:
        assert isinstance(model, Beit)
        data = self.config.data
        model.save_pretrained(run_dir / "model")
        mean, std = NORMALIZATION[data.normalization]
        preprocessing = {
            "image_size": self.config.model.image_size,
            "crop_share": data.crop_share or default_crop_share(self.config.model.image_size),
            "mean": mean,
            "std": std,
            "classes": self.classes,
            "data": builtin.NOTICE if data.path is None else data.path,
            "measured": {} if self.evaluation is None else self.evaluation.metrics(),
        }
        (run_dir / "model" / "preprocessing.json").write_text(json.dumps(preprocessing, indent=1) + "\n")
        if self.evaluation is not None:
            for path in self.evaluation.write(run_dir):
                print(f"wrote {path}", flush=True)

    def plan(self, config: RunConfig) -> dict[str, float]:
        forward = 2.0 * multiply_adds(self.config.model.classifier(len(self.classes)))
        return {"flops_per_image": 3 * forward, "forward_flops_per_image": forward}

    def close(self) -> None:
        for views in (self.views, self.validation_views):
            if views is not None:
                views.close()


def open_data(data: LabelledDataConfig) -> tuple[LabelledImages, LabelledImages | None]:
    """Training images and, where asked for, validation images with the same classes; ValueError in one line."""
    validation: LabelledImages | None = None
    if data.path is None:
        kind = (data.builtin, data.cache_dir)
        training = builtin_labelled(*kind, data.builtin_images, data.builtin_size, True, data.builtin_seed)
        if data.validate:
            count = data.builtin_validation_images
            validation = builtin_labelled(*kind, count, data.builtin_size, False)
    else:
        training = open_training(data.path)
        if data.validate:
            validation = open_validation(data.path, training.classes, data.validation_path)
    if data.num_classes is not None and len(training.classes) != data.num_classes:
        where = "the built-in data" if data.path is None else data.path
        raise ValueError(
            f"{where} has {len(training.classes)} classes, but --data.num-classes is {data.num_classes}; check the "
            f"path, or give --data.num-classes {len(training.classes)}"
        )
    return training, validation


def evaluation_views(
    data: LabelledDataConfig, images: LabelledImages, image_size: int, device: torch.device
) -> EvaluationLoader:
    """The validation views of a configuration."""
    mean, std = NORMALIZATION[data.normalization]
    return EvaluationLoader(
        images.source, images.labels, image_size=image_size, crop_share=data.crop_share, mean=mean, std=std,
        device=device, decoder=data.decoder, bad_images=BadImages(len(images), None, data.max_bad_share),
        threads=data.threads, prefetch=data.prefetch,
    )  # fmt: skip


def check_pairs(config: RunConfig, world: World) -> None:
    """Partners of mixup must meet in one micro-batch: each has to be even. ValueError that says which number is not."""
    micro = accumulation(config, world.size)
    parts = [len(part) for part in np.array_split(np.arange(config.batch_size // world.size), micro)]
    if any(part % 2 for part in parts):
        split = f"{world.size} processes x {micro} micro-batches of {min(parts)} to {max(parts)} images"
        raise ValueError(
            f"mixup and CutMix pair the images of a micro-batch, but --batch-size {config.batch_size} on {split} "
            "leaves one without a partner; choose --batch-size and --batch-per-device so that each part is even, or "
            "--augment.mixup 0 --augment.cutmix 0"
        )


def multiply_adds(config: BeitConfig) -> float:
    """Multiply-adds of one image's forward pass; 17.56e9 for BEiT-B at 224 pixels."""
    n, d = config.num_patches + 1, config.width
    block = (4 + 2 * config.mlp_ratio) * n * d * d + 2 * n * n * d
    patches = config.num_patches * d * config.in_chans * config.patch_size**2
    return patches + config.depth * block + d * config.num_classes
