"""Segmentation of whole images, and its scores from one confusion matrix over all pixels, images and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.data.segmentation_loader import WholeImages, normalised, scaled_size
from beit_fast.data.sources.writing import naming, write_text
from beit_fast.models import BeitForSemanticSegmentation
from beit_fast.models.heads import resize
from beit_fast.models.segmentation_windows import sliding_logits
from beit_fast.train.distributed.world import World
from beit_fast.visualize.segmentations import side_by_side


@dataclass(frozen=True)
class Inference:
    """How a class is found for every pixel of an image (official evaluation).

    The image is scaled to fit into `base`, a window of the training size slides over it, and the averaged logits are
    resized to the image. With several ratios or flips (the published multi-scale scores) the class shares of all of
    them are averaged, and the short side is `ratio` times that of `base`, but never below the window.

    Raises:
        ValueError: a number is out of its range.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    window: int = 512
    stride: int = 341
    base: tuple[int, int] = (2048, 512)
    """Longest and shortest side in pixels."""
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False
    """Every scale mirrored, too."""
    windows_per_batch: int = 8

    def __post_init__(self) -> None:
        if not self.ratios or min(self.ratios) <= 0 or min(self.base) < 1 or not 1 <= self.stride <= self.window:
            raise ValueError(
                "evaluation: needs positive ratios and base, and a stride in [1, window], got "
                f"{self.ratios}, {self.base}, {self.stride}, {self.window}"
            )

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """What an image is scaled to."""
        if self.ratios == (1.0,) and not self.flip:
            return [scaled_size(height, width, self.base)]
        shorts = [max(int(min(self.base) * ratio), self.window) for ratio in self.ratios]
        return [scaled_size(height, width, (float("inf"), short)) for short in shorts]

    @torch.no_grad()
    def classes(self, model: BeitForSemanticSegmentation, pixels: Tensor) -> Tensor:
        """uint8 (H, W, 3), on the model's device -> the class of every pixel, int64 (H, W)."""
        height, width = pixels.shape[:2]
        levels = pixels.permute(2, 0, 1)[None].float()
        sizes, shares = self.sizes(height, width), None
        for size in sizes:
            scaled = levels
            if size != (height, width):
                scaled = F.interpolate(levels, size=size, mode="bilinear", antialias=True)
            for mirrored in (False, True) if self.flip else (False,):
                image = normalised(scaled[0], self.mean, self.std)
                image = image.flip(-1) if mirrored else image
                logits = sliding_logits(model.predict, image, self.window, self.stride, self.windows_per_batch)
                logits = resize((logits.flip(-1) if mirrored else logits)[None], (height, width))[0]
                if len(sizes) == 1 and not self.flip:
                    return logits.argmax(0)
                shares = logits.softmax(0) if shares is None else shares.add_(logits.softmax(0))
        assert shares is not None
        return shares.argmax(0)


@dataclass(frozen=True)
class SegmentationScores:
    """What a model made of a labelled set; every image counts once, on however many devices."""

    names: tuple[str, ...]
    confusion: NDArray[np.int64]
    """(C, C) pixels of class i taken for class j."""
    images: int
    ignored: int = 0
    """Pixels that do not count."""
    examples: list[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)
    """Image, label and prediction of the first few."""

    @property
    def iou(self) -> NDArray[np.float64]:
        """(C,) intersection over union; NaN for a class that is neither there nor found."""
        hits = self.confusion.diagonal()
        return _shares(hits, self.confusion.sum(0) + self.confusion.sum(1) - hits)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """(C,) share of a class's pixels that are found; NaN for a class that is not there."""
        return _shares(self.confusion.diagonal(), self.confusion.sum(1))

    def metrics(self) -> dict[str, float]:
        return {
            "mean_iou_percent": 100 * float(np.nanmean(self.iou)),
            "mean_accuracy_percent": 100 * float(np.nanmean(self.accuracy)),
            "pixel_accuracy_percent": 100 * int(self.confusion.trace()) / int(self.confusion.sum()),
            "validation_images": float(self.images),
            "ignored_pixels_percent": 100 * self.ignored / (self.ignored + int(self.confusion.sum())),
            "classes_without_a_pixel": float((self.confusion.sum(1) == 0).sum()),
        }

    def write(self, folder: Path) -> list[Path]:
        """`per_class.tsv`, the worst class first, and `segmentations.png`; returns their paths."""
        rows = ["class\tpixels\tiou_percent\taccuracy_percent\tmost_often_taken_for"]
        iou, accuracy, pixels = self.iou, self.accuracy, self.confusion.sum(1)
        for number in np.argsort(np.nan_to_num(iou, nan=2.0), kind="stable").tolist():
            if np.isnan(iou[number]):
                continue
            others = self.confusion[number].copy()
            others[number] = 0
            taken = f"{self.names[int(others.argmax())]} ({int(others.max())})" if others.max() else ""
            found = "" if np.isnan(accuracy[number]) else f"{100 * accuracy[number]:.2f}"
            cells = [self.names[number], str(pixels[number]), f"{100 * iou[number]:.2f}", found, taken]
            rows.append("\t".join(cells))
        table = folder / "per_class.tsv"
        write_text(table, "\n".join(rows) + "\n")
        if not self.examples:
            return [table]
        picture = folder / "segmentations.png"
        with naming(picture):
            side_by_side(self.examples, self.names).save(picture)
        return [table, picture]


def _shares(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def confusion_matrix(labels: Tensor, classes: Tensor, count: int) -> Tensor:
    """(count, count) int64: counted pixels of class i taken for class j; negative labels do not count."""
    counted = labels >= 0
    return torch.bincount(labels[counted] * count + classes[counted], minlength=count * count).view(count, count)


@torch.no_grad()
def evaluate_segmentation(
    model: BeitForSemanticSegmentation,
    images: WholeImages,
    inference: Inference,
    names: Sequence[str],
    world: World,
    pictures: int = 0,
    alive: Callable[[], None] = lambda: None,
) -> SegmentationScores:
    """Run `model` (in evaluation mode, under whatever autocast) over its share of `images` and add up all ranks.

    `alive` is called for each image.

    Raises:
        ValueError: not one labelled pixel could be used.
    """
    count = len(names)
    confusion = torch.zeros(count, count, dtype=torch.int64, device=world.device)
    ignored = torch.zeros((), dtype=torch.int64, device=world.device)
    seen = torch.zeros((), dtype=torch.int64, device=world.device)
    examples: list[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]] = []
    for image in images.images(world.rank, world.size):
        alive()
        found = inference.classes(model, image.pixels.to(world.device, non_blocking=True))
        confusion += confusion_matrix(image.label.to(world.device, non_blocking=True), found, count)
        ignored += (image.label < 0).sum()
        seen += 1
        if len(examples) < pictures:
            examples.append((image.pixels.numpy(), image.label.numpy(), found.cpu().numpy()))
    world.sum(confusion)
    world.sum(seen)
    world.sum(ignored)
    if not int(confusion.sum()):
        raise ValueError("not one labelled pixel of a validation image could be used; bad files are named above")
    return SegmentationScores(tuple(names), confusion.cpu().numpy(), int(seen), int(ignored), examples)
