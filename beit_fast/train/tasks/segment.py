"""Semantic segmentation with a BEiT (paper, section 3.2 and table 14; the official configurations for ADE20K).

Crops of random scale, layer-wise learning-rate decay, an auxiliary loss, sliding windows in evaluation. The head is
UPerNet, as released, or SETR-PUP, as in the paper's tables. Batch norms make this the one task whose result depends on
how a batch is split: their statistics are those of a micro-batch over all devices.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from beit_fast.data import builtin
from beit_fast.data.augmentation.photometric import PhotometricDistortion
from beit_fast.data.screening import BadImages
from beit_fast.data.segmentation import (
    IGNORE,
    LabelCounts,
    SegmentationImages,
    builtin_segmentation,
    open_segmentation,
)
from beit_fast.data.segmentation_loader import (
    SegmentationBatch,
    SegmentationCropSampler,
    SegmentationLoader,
    WholeImages,
)
from beit_fast.data.sources import FolderSource
from beit_fast.data.sources.writing import write_text
from beit_fast.models import BeitForSemanticSegmentation, SegmentationConfig
from beit_fast.models.heads import resize
from beit_fast.models.segmentation import SegmentationHead, segmentation_config, segmentation_loss
from beit_fast.train.config import free, local
from beit_fast.train.distributed.batch_norm import synchronised
from beit_fast.train.distributed.world import World
from beit_fast.train.evaluation.segmentation import Inference, SegmentationScores, evaluate_segmentation
from beit_fast.train.optim import decay_groups
from beit_fast.train.schedules import accumulation
from beit_fast.train.task import StepOutput
from beit_fast.train.tasks.images import ImageDataConfig, ImageTask, WeightsConfig
from beit_fast.train.tasks.model import ModelConfig, multiply_adds
from beit_fast.train.tasks.weights import load_weights

logger = logging.getLogger("beit_fast.train")


@dataclass(frozen=True, kw_only=True)
class SegmentationDataConfig(ImageDataConfig):
    """Images with label maps."""

    path: str | None = local(None, free=False)
    """Folder of ADE20K (images/training, annotations/training, ...), or with images and labels, split or not into
    train and val. None: built-in scenes; a functional check, not ADE20K."""
    validate: bool = free(True)
    """Measure mIoU on the validation images, after the last step and every --eval-every steps."""
    num_classes: int | None = None
    """Classes of a pixel; None: as many as the folder's classes.txt or objectInfo150.txt has lines."""
    reduce_zero_label: bool = False
    """In label files 0 is no class, and class k is written as k + 1 (ADE20K)."""
    ignore_label: int = 255
    """Number, in label files, of pixels that do not count."""
    builtin_images: int = 2000
    """Training scenes where there is no path; their classes are the surfaces that a pixel can show."""
    builtin_validation_images: int = free(500)
    """Validation scenes."""
    builtin_size: int = 64
    """Side of a scene in pixels."""
    builtin_seed: int = 0
    """Which scenes are drawn for training; those for validation are always the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels is not None:
            raise ValueError("--data.channels: segmentation reads RGB of 8 bits only; leave it out")

    def open(self) -> tuple[SegmentationImages, SegmentationImages | None]:
        """Training images and, where asked for, validation images; ValueError in one line."""
        if self.path is None:
            sets = [(True, self.builtin_images, self.builtin_seed)]
            sets += [(False, self.builtin_validation_images, 0)] if self.validate else []
            parts = [
                builtin_segmentation(self.cache_dir, count, self.builtin_size, train, seed)
                for train, count, seed in sets
            ]
        else:
            rule = (self.num_classes, self.reduce_zero_label, self.ignore_label)
            parts = [open_segmentation(self.path, train, *rule) for train in (True, False)[: 1 + self.validate]]
            for part in parts:
                part.check_labels(self.builtin_seed)
        roots = [images.source.root for images in parts if isinstance(images.source, FolderSource)]
        if len(parts) == 2 and roots[0] == roots[1]:
            raise ValueError(
                f"{self.path}: is not split into train and val, so there are no validation images; split it, or give "
                "--data.no-validate to train without"
            )
        return parts[0], parts[1] if self.validate else None


@dataclass(frozen=True, kw_only=True)
class SegmentationModelConfig(ModelConfig):
    """The BEiT and the head on it; `image_size` is the side of the crops."""

    image_size: int = 512
    """Side of the crops, and of the windows in evaluation, in pixels."""
    head: SegmentationHead = "upernet"
    """`upernet`: the released models. `setr_pup`: the paper's tables; its head was not released."""
    channels: int | None = None
    """Width of the head; None: that of the backbone for UPerNet, 512 for SETR-PUP."""
    auxiliary_channels: int = 256
    """Width of UPerNet's auxiliary head."""
    dropout: float = 0.1
    """Share of the channels dropped in front of the last convolution of every head."""

    def segmentor(self, num_classes: int) -> SegmentationConfig:
        """The model's configuration; ValueError where it cannot be."""
        backbone = self.architecture(vocab_size=8192)
        return segmentation_config(
            backbone, num_classes, head=self.head, channels=self.channels,
            auxiliary_channels=self.auxiliary_channels, dropout=self.dropout,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """What is random about the training crops."""

    base: tuple[int, int] = (2048, 512)
    """Longest and shortest side that an image is scaled to fit into, before the random factor and in evaluation."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """Random factor on it."""
    cat_max_ratio: float = 0.75
    """Crops in which one class has a larger share are drawn again, ten times at the most; 1 takes any crop."""
    flip_probability: float = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue, each in half of the crops."""

    def sampling(self, crop: int) -> SegmentationCropSampler:
        return SegmentationCropSampler(crop, self.base, self.ratio, self.cat_max_ratio, self.flip_probability)


@dataclass(frozen=True, kw_only=True)
class SegmentationEvaluationConfig:
    """How whole images are segmented."""

    stride: int | None = free(None)
    """Pixels between windows; None: two thirds of a window (341 of 512, 426 of 640)."""
    ratios: tuple[float, ...] = free((1.0,))
    """Scales whose class shares are averaged; published multi-scale scores: 0.5 0.75 1 1.25 1.5 1.75, with flip."""
    flip: bool = free(False)
    """Every scale mirrored, too."""
    windows_per_batch: int = free(8)
    """Windows that go through the model at once."""
    pictures: int = free(6)
    """Validation images shown beside label and prediction in segmentations.png."""


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(WeightsConfig):
    """Semantic segmentation."""

    layer_decay: float = 0.9
    """Learning rate of a block over that of the block above it; all of the head learns at the full rate."""
    auxiliary_weight: float = 0.4
    """Weight of each auxiliary head's loss."""
    data: SegmentationDataConfig = field(default_factory=SegmentationDataConfig)
    model: SegmentationModelConfig = field(default_factory=SegmentationModelConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    evaluation: SegmentationEvaluationConfig = field(default_factory=SegmentationEvaluationConfig)

    without_weights: ClassVar[str] = "segmentation starts from pre-trained weights; --scratch does not"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.auxiliary_weight < 0:
            raise ValueError(f"--auxiliary-weight must be at least 0, got {self.auxiliary_weight}")

    def inference(self) -> Inference:
        """How this configuration segments whole images; ValueError where it cannot."""
        mean, std = self.data.mean_and_std()
        own, window = self.evaluation, self.model.image_size
        stride = max(window * 2 // 3, 1) if own.stride is None else own.stride
        return Inference(mean, std, window, stride, self.crops.base, own.ratios, own.flip, own.windows_per_batch)


class Segment(ImageTask):
    """Find the class of every pixel; leaves the model, a per-class table and pictures in the run folder."""

    name = "segment"
    config: SegmentConfig

    def __init__(self, config: SegmentConfig) -> None:
        super().__init__(config)
        self.validation: WholeImages | None = None
        self.scores: SegmentationScores | None = None

    def build(self, world: World) -> nn.Module:
        c, data = self.config, self.config.data
        check_batch_norm(c, world)
        self.world, self.inference = world, c.inference()
        training, validation = data.open()
        self.classes = training.classes
        self.loader = SegmentationLoader(
            training, c.crops.sampling(c.model.image_size),
            PhotometricDistortion() if c.crops.photometric else None, seed=c.seed,
            bad_images=self.screen(training.source, data.max_bad_share), **data.loader_options(world.device),
        )  # fmt: skip
        if validation is not None:
            bad = BadImages(len(validation), None, data.max_bad_share)
            self.validation = WholeImages(validation, decoder=data.decoder, bad_images=bad, threads=data.threads)
            self.others.append(self.validation)
        torch.manual_seed(c.seed)  # whatever was drawn above, the initial weights are those of the seed
        model = BeitForSemanticSegmentation(c.model.segmentor(len(self.classes)))
        if c.weights is not None:
            load_weights(model, c.weights, verbose=world.is_main)
        model.set_grad_checkpointing(c.model.grad_checkpointing)
        return synchronised(model.to(world.device), world)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"classes": len(self.classes)}

    def parameter_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        assert isinstance(model, BeitForSemanticSegmentation)
        return decay_groups(model, weight_decay, self.config.layer_decay, model.config.backbone.depth, "backbone.")

    def num_targets(self, batch: SegmentationBatch) -> int:
        """All pixels, ignored ones too, as in mmsegmentation."""
        return batch.labels.numel()

    def loss(self, model: nn.Module, batch: SegmentationBatch, num_targets: Tensor) -> StepOutput:
        logits = model(batch.images, batch.sample_keys)
        loss = segmentation_loss(logits, batch.labels, IGNORE, self.config.auxiliary_weight) / num_targets
        with torch.no_grad():
            classes = resize(logits.main, batch.labels.shape[-2:]).argmax(1)
            counted = batch.labels >= 0
            return StepOutput(
                loss, {"num_correct": (classes.eq(batch.labels) & counted).sum(), "num_counted": counted.sum()}
            )

    def after_step(self, model: nn.Module, step: int) -> None:
        """Say at the end of the first epoch what the label maps that all processes read hold."""
        epoch, counts = self.loader.first_epoch, self.loader.label_counts
        if epoch is None or step + 1 != (epoch + 1) * (self.num_samples() // self.config.batch_size):
            return
        numbers = torch.from_numpy(np.append(counts.pixels, counts.maps)).to(self.world.device)
        *pixels, maps = self.world.sum(numbers).tolist()
        if self.world.is_main:
            logger.warning("first epoch: %s", LabelCounts(np.array(pixels), maps).line(self.classes))

    def summarise(self, sums: dict[str, float]) -> dict[str, float]:
        return {"train_pixel_accuracy_percent": 100 * sums["num_correct"] / max(sums["num_counted"], 1)}

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """mIoU, mean and pixel accuracy on the validation images, by the averaged weights where the run keeps them."""
        images = self.validation
        if images is None:
            return {}
        assert isinstance(model, BeitForSemanticSegmentation)
        pictures = self.config.evaluation.pictures
        self.scores = evaluate_segmentation(
            model, images, self.inference, self.classes, self.world, pictures, self.alive
        )
        bad = {"bad_validation_images": float(len(images.bad_images))} if len(images.bad_images) else {}
        return self.scores.metrics() | bad

    def finish(self, model: nn.Module, folder: Path) -> None:
        assert isinstance(model, BeitForSemanticSegmentation)
        model.save_pretrained(folder / "model")
        preprocessing = {
            "mean": self.inference.mean,
            "std": self.inference.std,
            "base": self.inference.base,
            "stride": self.inference.stride,
            "classes": self.classes,
            "data": self.config.data.path or builtin.NOTICE,
            "measured": {} if self.scores is None else self.scores.metrics(),
        }
        write_text(folder / "model" / "preprocessing.json", json.dumps(preprocessing, indent=1) + "\n")
        if self.scores is not None:
            self.scores.write(folder)

    def plan(self) -> dict[str, float]:
        segmentor = self.config.model.segmentor(len(self.classes))
        forward = 2.0 * multiply_adds(segmentor.backbone)
        heads = head_flops(segmentor)
        return {"flops_per_image": 3 * (forward + heads), "backbone_flops_per_image": 3 * forward}


def check_batch_norm(config: SegmentConfig, world: World) -> None:
    """Pyramid pooling averages an image to one place: a batch norm over one image would have one value per channel."""
    if config.model.head != "upernet":
        return
    micro = accumulation(config, world.size)
    least = min(len(part) for part in np.array_split(np.arange(config.batch_size // world.size), micro))
    if least * world.size < 2:
        raise ValueError(
            f"UPerNet's batch norms need two images at once, but --batch-size {config.batch_size} in {micro} "
            "micro-batches leaves one alone; raise --batch-per-device, or use more devices"
        )


def head_flops(config: SegmentationConfig, training: bool = True) -> float:
    """FLOPs of the pyramid and the heads for one image, forward; in training with the auxiliary ones."""
    with torch.device("meta"):
        model = BeitForSemanticSegmentation(config).eval()
        maps = [torch.empty(1, config.backbone.width, *config.backbone.grid) for _ in config.blocks]
        with FlopCounterMode(display=False) as counter:
            maps = model.backbone.pyramid(maps)
            upernet = config.head == "upernet"
            model.decode_head(maps if upernet else maps[-1])
            if training and isinstance(model.auxiliary_head, nn.ModuleList):
                for head, features in zip(model.auxiliary_head, maps[:-1], strict=True):
                    head(features)
            elif training:
                model.auxiliary_head(maps[2])
    return float(counter.get_total_flops())
