"""Crops of images and label maps through one geometry, and whole images for evaluation.

Training (official order): random scale, crop, flip, photometric distortion, normalisation, padding. A crop is a window
of whole pixels of the source, the same for image and labels; DALI decodes no more of the image than that. The window is
resized to the crop: the image bilinearly, antialiased where it shrinks, the labels by the nearest pixel centre.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.data.augmentation.photometric import PhotometricDistortion, distort
from beit_fast.data.decoding import Crop, open_decoder
from beit_fast.data.loader import Loader, Request
from beit_fast.data.reading import Sample, decode
from beit_fast.data.resizing import resize
from beit_fast.data.sampling import sample_keys, uniforms
from beit_fast.data.screening import BadImages, Rejection
from beit_fast.data.segmentation import IGNORE, LabelCounts, SegmentationImages

_STREAM = 3
_ATTEMPTS = 10


class Placement(NamedTuple):
    """Where a crop comes from and how large it becomes."""

    window: tuple[int, int, int, int]
    """Top, left, height, width in pixels of the source."""
    size: tuple[int, int]
    """Height and width in the crop; what is missing there is padding, below and to the right."""
    flip: bool


@dataclass(frozen=True)
class SegmentationCropSampler:
    """Random scale, crop and flip of mmsegmentation; the defaults are those of ADE20K at 512 pixels.

    Raises:
        ValueError: a number is out of its range.
    """

    crop: int = 512
    """Side of the crop in pixels."""
    base: tuple[int, int] = (2048, 512)
    """Longest and shortest side of an image at ratio 1; it fits into both, its proportions kept."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """Random factor on `base`, uniform."""
    cat_max_ratio: float = 0.75
    """Crops in which one class has a larger share are drawn again, ten times at the most; 1 takes any crop."""
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        if self.crop < 1 or min(self.base) < 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"crops: needs positive crop, base and ratio, got {self.crop}, {self.base}, {self.ratio}")
        if not 0 < self.cat_max_ratio <= 1 or not 0 <= self.flip_probability <= 1:
            raise ValueError(
                f"crops: cat_max_ratio must be in (0, 1] and flip_probability in [0, 1], got {self.cat_max_ratio}, "
                f"{self.flip_probability}"
            )

    def sample(self, key: int, label: NDArray[np.int64]) -> Placement:
        """The crop of an image with label map (H, W); a function of `key` and the labels alone."""
        u = uniforms([key], 2 + 2 * (_ATTEMPTS + 1), _STREAM)[0]
        height, width = label.shape
        scale = self.ratio[0] + (self.ratio[1] - self.ratio[0]) * u[0]
        scaled = scaled_size(height, width, (self.base[0] * scale, self.base[1] * scale))
        size = min(scaled[0], self.crop), min(scaled[1], self.crop)
        h, w = _in_source(size[0], scaled[0], height), _in_source(size[1], scaled[1], width)
        window = (0, 0, h, w)
        for corner in u[2:].reshape(-1, 2)[: 1 if self.cat_max_ratio == 1 else None]:
            top, left = (int(v * (whole - part + 1)) for v, whole, part in zip(corner, scaled, size, strict=True))
            top, left = round(top * height / scaled[0]), round(left * width / scaled[1])
            window = (min(top, height - h), min(left, width - w), h, w)
            if self._is_mixed(label[window[0] : window[0] + h, window[1] : window[1] + w]):
                break
        return Placement(window, size, bool(u[1] < self.flip_probability))

    def _is_mixed(self, labels: NDArray[np.int64]) -> bool:
        """Whether there are two classes and none has too large a share of what counts."""
        counts = np.bincount((labels - IGNORE).ravel())[1:]
        return bool(np.count_nonzero(counts) > 1 and counts.max() < self.cat_max_ratio * counts.sum())


def scaled_size(height: int, width: int, base: tuple[float, float]) -> tuple[int, int]:
    """Height and width scaled to fit into the longest and shortest side `base`, proportions kept, at least 1."""
    scale = min(max(base) / max(height, width), min(base) / min(height, width))  # a longest side may be infinite
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def _in_source(part: int, scaled: int, whole: int) -> int:
    return whole if part == scaled else min(max(round(part * whole / scaled), 1), whole)


def nearest(labels: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.int64]:
    """(h, w) -> `size`: the label of the pixel in which each new pixel's centre lies."""
    rows, columns = ((np.arange(new) * 2 + 1) * old // (2 * new) for new, old in zip(size, labels.shape, strict=True))
    return labels[rows[:, None], columns]


@dataclass(frozen=True)
class SegmentationBatch:
    """A batch on the device of its views, except `indices`."""

    images: Tensor
    """float32 (b, 3, S, S), normalised; padding is 0."""
    labels: Tensor
    """int64 (b, S, S), `IGNORE` in padding and where nothing counts."""
    sample_keys: Tensor
    """int64 (b,): for drop path."""
    indices: Tensor
    """int64 (b,): places in the source, replacements of bad images included."""

    def __len__(self) -> int:
        return len(self.images)


class SegmentationLoader(Loader):
    """Random crops of labelled images.

    An image that cannot be used, or whose label file is missing or damaged, is replaced by the next one of the epoch's
    order. A label map of another size, or with a number that is no class, ends the run with a ValueError that names it.

    Args:
        data: images and label files.
        sampler: draws the crops.
        photometric: draws what is done to the colours; None: nothing.
        seed: of everything that is random, together with epoch and sample.
        mean, std: normalise the crops.
        decoder: "dali", "pil" or "auto".
        value_range: values of float pixels that become black and white; None refuses such images.
        device, bad_images, threads, prefetch: see `Loader`.
    """

    def __init__(
        self, data: SegmentationImages, sampler: SegmentationCropSampler, photometric: PhotometricDistortion | None, *,
        seed: int, mean: Sequence[float], std: Sequence[float], device: str | torch.device = "cpu",
        decoder: Literal["auto", "dali", "pil"] = "auto", bad_images: BadImages | None = None,
        threads: int | None = None, prefetch: int = 2, value_range: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(data.source, seed=seed, device=device, bad_images=bad_images, threads=threads,
                         prefetch=prefetch)  # fmt: skip
        self.data, self.sampler, self.photometric = data, sampler, photometric
        self.mean, self.std = tuple(mean), tuple(std)
        self._decoder = open_decoder(decoder, self.threads, value_range)
        self.first_epoch: int | None = None
        self.label_counts = LabelCounts(np.zeros(data.rule.num_classes + 1, np.int64), 0)
        """Of the label maps that were read for the first epoch."""
        self._lock = threading.Lock()

    def batches(self, requests: Iterable[Request]) -> Iterator[SegmentationBatch]:
        """Yield one batch per request, in order."""
        return self.ahead(self._make(request.epoch, samples) for request, samples in self.read_ahead(requests))

    def _make(self, epoch: int, samples: list[Sample]) -> SegmentationBatch:
        side = self.sampler.crop
        self.first_epoch = epoch if self.first_epoch is None else self.first_epoch
        counted = itertools.repeat(epoch == self.first_epoch)
        crops = torch.zeros(len(samples), side, side, 3, dtype=torch.uint8)
        labels = np.full((len(samples), side, side), IGNORE, np.int64)
        keys, sizes = torch.zeros(len(samples), dtype=torch.int64), [(side, side)] * len(samples)

        def make(rows: list[int]) -> dict[int, Rejection]:
            keys[rows] = sample_keys(self.seed, epoch, [samples[row].index for row in rows])
            drawn = list(self.workers.map(self._draw, [samples[row] for row in rows], keys[rows].tolist(), counted))
            failed = {row: d for row, d in zip(rows, drawn, strict=True) if isinstance(d, Rejection)}
            placed = [(row, *d) for row, d in zip(rows, drawn, strict=True) if not isinstance(d, Rejection)]
            windows = np.array([placement.window for _, placement, _ in placed], np.int32).reshape(-1, 4)
            pictures = decode(self._decoder, [samples[row] for row, _, _ in placed], windows)
            list(self.workers.map(fill, placed, pictures))
            return failed | {
                row: p for (row, _, _), p in zip(placed, pictures, strict=True) if isinstance(p, Rejection)
            }

        def fill(entry: tuple[int, Placement, NDArray[np.int64]], picture: Crop | Rejection) -> None:
            row, placement, label = entry
            if isinstance(picture, Rejection):
                return
            (height, width), sizes[row] = placement.size, placement.size
            crop, label = resize(picture, placement.size, "bilinear"), nearest(label, placement.size)
            crops[row, :height, :width] = crop.flip(1) if placement.flip else crop
            labels[row, :height, :width] = label[:, ::-1] if placement.flip else label

        indices = self.make_all(epoch, samples, make)
        levels = self.send(crops).permute(0, 3, 1, 2).float()
        if self.photometric is not None:
            levels = distort(levels, self.photometric.sample(keys))
        images = normalised(levels, self.mean, self.std).contiguous()
        for row, (height, width) in enumerate(sizes):
            images[row, :, height:] = 0
            images[row, :, :, width:] = 0
        return SegmentationBatch(
            images, self.send(torch.from_numpy(labels)), self.send(keys), torch.from_numpy(indices)
        )

    def _draw(self, sample: Sample, key: int, counted: bool) -> tuple[Placement, NDArray[np.int64]] | Rejection:
        """Draw the crop of a sample; with it its part of the label map, which is `counted` as a whole."""
        label = self.data.read_label(sample.index, sample.header)
        if isinstance(label, Rejection):
            return label
        if counted:
            with self._lock:
                self.label_counts = self.label_counts.plus(label)
        placement = self.sampler.sample(key, label)
        top, left, height, width = placement.window
        return placement, label[top : top + height, left : left + width]


def normalised(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Levels (..., 3, H, W) in [0, 255] -> (levels / 255 - mean) / std."""
    shift, scale = (levels.new_tensor(values)[:, None, None] * 255 for values in (mean, std))
    return (levels - shift) / scale


@dataclass(frozen=True)
class WholeImage:
    """One image for evaluation, in memory."""

    number: int
    """Its index in the source."""
    pixels: Tensor
    """uint8 (H, W, 3)"""
    label: Tensor
    """int64 (H, W)"""


class WholeImages(Loader):
    """Every image of a set once, whole. A bad one is left out, reported to `bad_images` and named there."""

    def __init__(
        self, data: SegmentationImages, *, decoder: Literal["auto", "dali", "pil"] = "auto",
        bad_images: BadImages | None = None, threads: int | None = None, prefetch: int = 2,
        value_range: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(data.source, bad_images=bad_images, threads=threads, prefetch=prefetch)
        self.data = data
        self._decoder = open_decoder(decoder, self.threads, value_range)

    def images(self, rank: int = 0, size: int = 1) -> Iterator[WholeImage]:
        """Yield this rank's share: `rank`, `rank + size`, ..."""
        return self.ahead(self._read(range(rank, len(self.data), size)))

    def _read(self, own: range) -> Iterator[WholeImage]:
        for first in range(0, len(own), self.threads):
            decoded = self.decode_whole(self._decoder, own[first : first + self.threads])
            labels = self.workers.map(self._label, [sample for sample, _ in decoded])
            for (sample, picture), label in zip(decoded, labels, strict=True):
                if isinstance(label, Rejection):
                    self.bad_images.add(self.source.name(sample.index), label.reason)
                    continue
                pixels = torch.from_numpy(np.array(picture))  # a copy: the decoder's buffer is used again
                yield WholeImage(sample.index, pixels, torch.from_numpy(label))

    def _label(self, sample: Sample) -> NDArray[np.int64] | Rejection:
        return self.data.read_label(sample.index, sample.header)
