"""Fine-tuning for classification (paper, section 2.6 and table 13), and training from scratch for comparison.

From pre-trained weights, with layer-wise learning-rate decay, mixup and CutMix, RandAugment, random erasing. The same
task serves intermediate fine-tuning, higher resolutions and smaller data sets; recipes differ in values only.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

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
from beit_fast.data.loader import Request
from beit_fast.data.screening import BadImages
from beit_fast.data.sources.writing import write_text
from beit_fast.models import Beit, BeitConfig
from beit_fast.train.config import RunConfig, free, local
from beit_fast.train.distributed.world import World
from beit_fast.train.evaluation.classification import Evaluation, evaluate_classifier
from beit_fast.train.optim import decay_groups
from beit_fast.train.schedules import accumulation
from beit_fast.train.task import StepOutput
from beit_fast.train.tasks.adapters import LoraConfig, add_lora, freeze, merged
from beit_fast.train.tasks.images import ImageDataConfig, ImageTask, WeightsConfig
from beit_fast.train.tasks.model import ModelConfig, multiply_adds
from beit_fast.train.tasks.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class LabelledDataConfig(ImageDataConfig):
    """Labelled images."""

    path: str | None = local(None, free=False)
    """Folder with `train` and `val` in it (class folders or tar shards with .cls entries), or extracted CIFAR-100.
    None: built-in images; a functional check, not ImageNet."""
    validation_path: str | None = local(None)
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
    crop_share: float | None = None
    """Share of the shorter side that evaluation crops; None: 0.875 below 384 pixels, 1 from there on."""
    class_map: str | None = None
    """File that says which validation class is which of training, where their names differ: a line each, validation
    class, tab, training class (or its number)."""

    def open(self) -> tuple[LabelledImages, LabelledImages | None]:
        """Training images and, where asked for, validation images with the same classes; ValueError in one line."""
        validation: LabelledImages | None = None
        if self.path is None:
            train, held_out = self.builtin_images, self.builtin_validation_images
            training = builtin_labelled(self.builtin, self.cache_dir, train, self.builtin_size, True, self.builtin_seed)
            if self.validate:
                validation = builtin_labelled(self.builtin, self.cache_dir, held_out, self.builtin_size, False)
        else:
            training = open_training(self.path)
            if self.validate:
                validation = open_validation(self.path, training.classes, self.validation_path, self.class_map)
        count = len(training.classes)
        if self.num_classes is not None and count != self.num_classes:
            raise ValueError(
                f"{self.path or 'the built-in data'} has {count} classes, but --data.num-classes is "
                f"{self.num_classes}; check the path, or give --data.num-classes {count}"
            )
        return training, validation

    def evaluation_loader(
        self, images: LabelledImages, image_size: int | tuple[int, int], device: torch.device
    ) -> EvaluationLoader:
        """Centre crops of the images."""
        bad_images = BadImages(len(images), None, self.max_bad_share)
        return EvaluationLoader(
            images.source, images.labels, image_size=image_size, crop_share=self.crop_share, bad_images=bad_images,
            **self.loader_options(device),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClassifierModelConfig(ModelConfig):
    """The BEiT to fine-tune; size and preset are those of its weights."""

    global_pool: Literal["avg", "token"] = "avg"
    """What the head reads: the mean of the patch tokens, or the CLS token."""
    compile: Literal["none", "default", "cuda-graph"] = free("none")
    """torch.compile of the model; `cuda-graph` replays the compiled kernels without launching them one by one."""

    def classifier(self, num_classes: int, in_chans: int = 3) -> BeitConfig:
        """The model's configuration as a classifier; ValueError where it cannot be."""
        architecture = self.architecture(vocab_size=8192, in_chans=in_chans)
        return architecture.for_classification(num_classes, global_pool=self.global_pool)


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

    def __post_init__(self) -> None:
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"--augment.smoothing must be in [0, 1), got {self.smoothing}")

    def views(self) -> Augmentation:
        rand_augment = RandAugment(magnitude=self.rand_augment) if self.rand_augment else None
        erasing = RandomErasing(probability=self.erasing) if self.erasing else None
        return Augmentation(self.scale, self.ratio, self.flip_probability, rand_augment, erasing, self.repeats)

    def mixing(self) -> Mixing:
        return Mixing(mixup_alpha=self.mixup, cutmix_alpha=self.cutmix)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(WeightsConfig):
    """Fine-tuning for classification."""

    layer_decay: float = 0.65
    """Learning rate of a layer over that of the layer above it; 1 trains all layers alike."""
    frozen_blocks: int = 0
    """Blocks, from the first on, that keep their weights, and with them the patch and position embeddings."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: LabelledDataConfig = field(default_factory=LabelledDataConfig)
    model: ClassifierModelConfig = field(default_factory=ClassifierModelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    without_weights: ClassVar[str] = "fine-tuning starts from pre-trained weights; --scratch does not"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scratch and (self.frozen_blocks or self.lora.rank):
            raise ValueError("--frozen-blocks and --lora.rank keep weights as they are; give --weights")


class Finetune(ImageTask):
    """Classify images with a BEiT; leaves classifier, per-class table and confusion picture in the run folder."""

    name = "finetune"
    can_shard = True
    config: FinetuneConfig

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        self.validation_loader: EvaluationLoader | None = None
        self.evaluation: Evaluation | None = None

    def build(self, world: World) -> nn.Module:
        c, data = self.config, self.config.data
        self.world, self.mixing = world, c.augment.mixing()
        if self.mixing.active:
            check_pairs(c, world)
            self.order = paired_order(c.batch_size)
        training, validation = data.open()
        self.classes = training.classes
        self.loader = ClassificationLoader(
            training.source, training.labels, c.augment.views(), seed=c.seed, image_size=c.model.image_size,
            bad_images=self.screen(training.source, data.max_bad_share), **data.loader_options(world.device),
        )  # fmt: skip
        if validation is not None:
            self.validation_loader = data.evaluation_loader(validation, c.model.image_size, world.device)
            self.others.append(self.validation_loader)
        torch.manual_seed(c.seed)  # whatever was drawn above, the initial weights are those of the seed
        model = Beit(c.model.classifier(len(self.classes), data.in_chans))
        if c.weights is not None:
            load_weights(model, c.weights, verbose=world.is_main)
        freeze(model, c.frozen_blocks)
        add_lora(model, c.lora)
        model.set_grad_checkpointing(c.model.grad_checkpointing)
        model = model.to(world.device)
        if c.model.compile != "none":
            model.compile(mode="reduce-overhead" if c.model.compile == "cuda-graph" else None)
        return model

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"classes": len(self.classes)}

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        assert isinstance(model, Beit)
        return decay_groups(model, weight_decay, self.config.layer_decay, model.config.depth)

    def batches(self, requests: Iterator[Request]) -> Iterator[LabelledBatch]:
        return super().batches(map(self._paired, requests))

    def _paired(self, request: Request) -> Request:
        """The same samples of the epoch, with the partners of mixup next to each other."""
        if not self.mixing.active:
            return request
        step, index = np.divmod(request.positions, self.config.batch_size)
        return Request(request.epoch, step * self.config.batch_size + self.order[index])

    def prepare(self, batch: LabelledBatch, step: int) -> LabelledBatch:
        """The batch with its images erased and mixed."""
        if batch.rectangles is not None:
            batch = dataclasses.replace(batch, images=erase(batch.images, batch.rectangles, batch.sample_keys))
        if not self.mixing.active:
            return batch
        mix = self.mixing.sample(self.config.seed, step, (batch.images.shape[-2], batch.images.shape[-1]))
        weight = torch.full((), mix.lam, device=batch.images.device)
        return dataclasses.replace(batch, images=mix_images(batch.images, mix), label_weight=weight)

    def loss(self, model: nn.Module, batch: LabelledBatch, num_targets: Tensor) -> StepOutput:
        logits, labels, weight = model(batch.images, batch.sample_keys), batch.labels, batch.label_weight
        losses = mixed_cross_entropy(logits, labels, 1.0 if weight is None else weight, self.config.augment.smoothing)
        # Of a mixed image the class with the larger share counts.
        dominant = labels if weight is None else torch.where(weight >= 0.5, labels, swap_partners(labels))
        correct = (logits.argmax(-1) == dominant).sum()
        return StepOutput(
            losses.sum() / num_targets, {"num_correct": correct, "num_images": torch.ones_like(labels).sum()}
        )

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        return {"train_top1_percent": 100 * sums["num_correct"] / sums["num_images"]}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Top-1, top-5 and loss on the validation images, by the averaged weights where the run keeps them."""
        loader = self.validation_loader
        if loader is None:
            return {}
        self.evaluation = evaluate_classifier(
            model, loader, self.classes, self.config.batch_per_device, self.world, self.alive
        )
        bad = {"bad_validation_images": float(len(loader.bad_images))} if len(loader.bad_images) else {}
        return self.evaluation.metrics() | bad

    def finish(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, Beit)
        data = self.config.data
        merged(model).save_pretrained(folder / "model")
        preprocessing = {
            "image_size": self.config.model.image_size,
            "crop_share": data.crop_share or default_crop_share(self.config.model.image_size),
            **data.description(),
            "classes": self.classes,
            "data": data.path or builtin.NOTICE,
            "measured": {} if self.evaluation is None else self.evaluation.metrics(),
        }
        write_text(folder / "model" / "preprocessing.json", json.dumps(preprocessing, indent=1) + "\n")
        if self.evaluation is not None:
            self.evaluation.write(folder)

    def plan(self) -> dict[str, float]:
        forward = 2.0 * multiply_adds(self.config.model.classifier(len(self.classes), self.config.data.in_chans))
        return {"flops_per_image": 3 * forward, "forward_flops_per_image": forward}


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
