"""Labelled views: random crops with RandAugment and erasing for training, the exact centre crop for evaluation.

Training (paper, table 13; official order): a random resized crop (bicubic), flip, RandAugment, normalisation, random
erasing, all drawn from (seed, epoch, sample, repetition). Mixup and CutMix belong to the batch: `augmentation.mix`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.data.augmentation.erasing import RandomErasing
from beit_fast.data.augmentation.rand_augment import Augmenter, RandAugment
from beit_fast.data.loader import Loader, Request
from beit_fast.data.reading import Sample, decode
from beit_fast.data.resizing import empty_views, height_width, resize
from beit_fast.data.sampling import CropSampler, sample_keys
from beit_fast.data.screening import BadImages, Rejection
from beit_fast.data.sources import ImageSource

Triple = Sequence[float]


@dataclass(frozen=True)
class LabelledBatch:
    """A batch on the device of its views, except `indices` and `rectangles`."""

    images: Tensor
    """float32 (b, C, H, W), normalised."""
    labels: Tensor
    """int64 (b,)."""
    sample_keys: Tensor
    """int64 (b,): for drop path and erasing."""
    indices: Tensor
    """int64 (b,): places in the source, replacements of bad images included."""
    rectangles: NDArray[np.int64] | None = None
    """(b, 4) what is to be erased: top, left, height, width; None: nothing."""
    label_weight: Tensor | None = None
    """0-d: share of the own label in a mixed image; the rest is its partner's. None: nothing is mixed."""

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Augmentation:
    """What is random about a training view."""

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_probability: float = 0.5
    rand_augment: RandAugment | None = None
    erasing: RandomErasing | None = None
    repeats: int = 1
    """Views of one image per batch (repeated augmentation; Hoffer et al., 2020): an epoch then holds as many views as
    before, of 1/repeats of the images."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeated augmentation: repeats must be at least 1, got {self.repeats}")


class ClassificationLoader(Loader):
    """Random views of a labelled source.

    A position p of an epoch is view p % repeats of the image at p // repeats in the epoch's order. An image that cannot
    be used is replaced by the next one of that order, with its label.

    Args:
        source: the images.
        labels: (n,) one class per image.
        augmentation: what is done to them.
        seed: of everything that is random, together with epoch, sample and repetition.
        image_size: side of the views in pixels, or (height, width).
        mean, std: normalise the views.
        decoder: "dali", "pil" or "auto".
        device, bad_images, threads, prefetch, value_range, channels: see `Loader`.

    Raises:
        ValueError: arguments do not fit, or RandAugment is to work on images with channels of their own.
        ModuleNotFoundError: `beit_fast._C`, or DALI for RandAugment, is missing.
    """

    def __init__(
        self, source: ImageSource, labels: NDArray[np.integer], augmentation: Augmentation, *,
        seed: int, image_size: int | tuple[int, int] = 224,
        mean: Triple = (0.5, 0.5, 0.5), std: Triple = (0.5, 0.5, 0.5),
        device: str | torch.device = "cpu", decoder: Literal["auto", "dali", "pil"] = "auto",
        bad_images: BadImages | None = None, threads: int | None = None, prefetch: int = 2,
        value_range: tuple[float, float] | None = None, channels: int | None = None,
    ) -> None:  # fmt: skip
        if channels is not None and augmentation.rand_augment is not None:
            raise ValueError("RandAugment is made for RGB of 8 bits; with --data.channels, --augment.rand-augment 0")
        super().__init__(
            source, seed=seed, device=device, bad_images=bad_images, threads=threads, prefetch=prefetch,
            channels=channels, value_range=value_range,
        )  # fmt: skip
        self.labels = _checked(labels, source, image_size)
        self.image_size, self.mean, self.std = height_width(image_size), tuple(mean), tuple(std)
        self.augmentation = augmentation
        self._decoder = self.open_decoder(decoder)
        self._sampler = CropSampler(augmentation.scale, augmentation.ratio, augmentation.flip_probability, 0, 0, 0)
        self._augmenter = Augmenter(self.threads) if augmentation.rand_augment is not None else None

    def batches(self, requests: Iterable[Request]) -> Iterator[LabelledBatch]:
        """Yield one batch per request, in order."""
        repeats = self.augmentation.repeats
        return self.ahead(
            self._make(request.epoch, request.positions % repeats, samples)
            for request, samples in self.read_ahead(requests, repeats)
        )

    def _make(self, epoch: int, repetitions: NDArray[np.int64], samples: list[Sample]) -> LabelledBatch:
        size, augmentation = self.image_size, self.augmentation
        views = empty_views(len(samples), size, self.channels)
        flips = np.zeros(len(samples), np.bool_)
        # Repetitions are told apart by counting epochs as many times.
        view_epochs = epoch * augmentation.repeats + repetitions

        def make(rows: list[int]) -> dict[int, Rejection]:
            windows = np.empty((len(samples), 4), np.int32)
            for view_epoch in np.unique(view_epochs[rows]):
                alike = [row for row in rows if view_epochs[row] == view_epoch]
                windows[alike], flips[alike], _ = self.draw(
                    self._sampler, int(view_epoch), [samples[row] for row in alike]
                )
            crops = decode(self._decoder, [samples[row] for row in rows], windows[rows])
            list(self.workers.map(resize_row, rows, crops))
            return {row: crop for row, crop in zip(rows, crops, strict=True) if isinstance(crop, Rejection)}

        def resize_row(row: int, crop: Any) -> None:
            if not isinstance(crop, Rejection):
                views[row] = resize(crop, size, "bicubic")

        indices = self.make_all(epoch, samples, make)
        keys = torch.empty(len(samples), dtype=torch.int64)
        for view_epoch in np.unique(view_epochs):
            alike = view_epochs == view_epoch
            keys[alike] = sample_keys(self.seed, int(view_epoch), indices[alike])
        if augmentation.rand_augment is not None and self._augmenter is not None:
            self._augmenter.apply(views, augmentation.rand_augment.sample(keys))
        rectangles = None if augmentation.erasing is None else augmentation.erasing.sample(keys, size)
        images = self.normalise(views, flips, self.mean, self.std)
        labels = self.send(torch.from_numpy(self.labels[indices]))
        return LabelledBatch(images, labels, self.send(keys), torch.from_numpy(indices), rectangles)


class EvaluationLoader(Loader):
    """Centre crops of a labelled source, with torchvision's geometry (`evaluation_geometry`).

    A bad image is left out, reported to `bad_images` and named there; it cannot be replaced. The arguments are those of
    `ClassificationLoader`; `crop_share` is the share of the shorter side in the crop, None: `default_crop_share`.
    """

    def __init__(
        self, source: ImageSource, labels: NDArray[np.integer], *,
        image_size: int | tuple[int, int] = 224, crop_share: float | None = None,
        mean: Triple = (0.5, 0.5, 0.5), std: Triple = (0.5, 0.5, 0.5),
        device: str | torch.device = "cpu", decoder: Literal["auto", "dali", "pil"] = "auto",
        bad_images: BadImages | None = None, threads: int | None = None, prefetch: int = 2,
        value_range: tuple[float, float] | None = None, channels: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            source, device=device, bad_images=bad_images, threads=threads, prefetch=prefetch, channels=channels,
            value_range=value_range,
        )  # fmt: skip
        self.labels = _checked(labels, source, image_size)
        self.image_size, self.mean, self.std = height_width(image_size), tuple(mean), tuple(std)
        self._decoder = self.open_decoder(decoder)
        self.crop_share = default_crop_share(image_size) if crop_share is None else crop_share
        if not 0 < self.crop_share <= 1:
            raise ValueError(f"crop_share must be in (0, 1], got {crop_share}")

    def batches(self, batch_size: int, rank: int = 0, size: int = 1) -> Iterator[LabelledBatch]:
        """Yield every image of this rank's share (`rank`, `rank + size`, ...) once; nothing is padded."""
        own = range(rank, len(self.source), size)
        batches = (self._make(own[start : start + batch_size]) for start in range(0, len(own), batch_size))
        return self.ahead(batch for batch in batches if batch is not None)

    def _make(self, places: Sequence[int]) -> LabelledBatch | None:
        decoded = self.decode_whole(self._decoder, places)
        if not decoded:
            return None
        views = torch.stack(list(self.workers.map(self._centre, [pixels for _, pixels in decoded])))
        indices = np.array([sample.index for sample, _ in decoded], np.int64)
        images = self.normalise(views, np.zeros(len(views), np.bool_), self.mean, self.std)
        keys = torch.zeros(len(views), dtype=torch.int64, device=self.device)
        labels = self.send(torch.from_numpy(self.labels[indices]))
        return LabelledBatch(images, labels, keys, torch.from_numpy(indices))

    def _centre(self, picture: Any) -> Tensor:
        return centre_view(picture, self.image_size, self.crop_share)


def _checked(labels: NDArray[np.integer], source: ImageSource, image_size: int | tuple[int, int]) -> NDArray[np.int64]:
    if len(labels) != len(source):
        raise ValueError(f"labels: {len(labels)} for {len(source)} images")
    if min(height_width(image_size)) < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    return np.asarray(labels, np.int64)


def default_crop_share(image_size: int | tuple[int, int]) -> float:
    """The official code's: 224/256 below 384 pixels, the whole image from there on."""
    return 224 / 256 if min(height_width(image_size)) < 384 else 1.0


def evaluation_geometry(
    height: int, width: int, image_size: int | tuple[int, int], crop_share: float
) -> tuple[int, int, int, int]:
    """(height, width) of the resized image and (top, left) of its centre crop, as torchvision computes them.

    The short side becomes int(image_size / crop_share) and the long one keeps the ratio, rounded down; the crop's
    corner is rounded to even halves. DALI's `resize_shorter` rounds otherwise and is off by up to a pixel. For a view
    (height, width) that is not square, the image becomes as large as covers the view over crop_share.
    """
    view_height, view_width = height_width(image_size)
    if view_height != view_width:
        scale = max(view_height / crop_share / height, view_width / crop_share / width)
        resized_height, resized_width = max(int(height * scale), view_height), max(int(width * scale), view_width)
    else:
        short = int(view_height / crop_share)
        if height <= width:
            resized_height, resized_width = short, int(short * width / height)
        else:
            resized_height, resized_width = int(short * height / width), short
    top, left = round((resized_height - view_height) / 2.0), round((resized_width - view_width) / 2.0)
    return resized_height, resized_width, top, left


def centre_view(picture: Any, image_size: int | tuple[int, int], crop_share: float) -> Tensor:
    """The evaluation view (H, W, C) of a picture (h, w, C), in its type."""
    height, width, top, left = evaluation_geometry(picture.shape[0], picture.shape[1], image_size, crop_share)
    view_height, view_width = height_width(image_size)
    return resize(picture, (height, width), "bicubic")[top : top + view_height, left : left + view_width]
