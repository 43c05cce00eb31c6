"""Crops of images and label maps through one geometry, and whole images for evaluation.

Training (official order): random scale, crop, flip, photometric distortion, normalisation, padding. A crop is a window
of whole pixels of the source, the same for image and labels; DALI decodes no more of the image than that. The window is
resized to the crop: the image bilinearly, antialiased where it shrinks, the labels by the nearest pixel centre.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.data.augmentation.photometric import PhotometricDistortion, distort
from beit_fast.data.decoding import Crop, DaliDecoder, Decoder, PilDecoder, has_dali
from beit_fast.data.loader import Request
from beit_fast.data.prefetch import Prefetcher
from beit_fast.data.reading import Sample, ScreenedReader
from beit_fast.data.sampling import compiled_module, sample_keys, uniforms
from beit_fast.data.screening import BadImages, Rejection
from beit_fast.data.segmentation import IGNORE, SegmentationImages

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
        for place in u[2:].reshape(-1, 2)[: 1 if self.cat_max_ratio == 1 else None]:
            top, left = (int(v * (whole - part + 1)) for v, whole, part in zip(place, scaled, size, strict=True))
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


def bilinear(picture: Crop, size: tuple[int, int]) -> Tensor:
    """uint8 (h, w, 3) -> (*size, 3), bilinear, antialiased where it shrinks."""
    image = torch.from_numpy(np.require(picture, requirements=["C", "W"])).permute(2, 0, 1)[None]
    if tuple(picture.shape[:2]) != size:
        image = F.interpolate(image, size=size, mode="bilinear", antialias=True)
    return image[0].permute(1, 2, 0)


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


class _Raw(NamedTuple):
    """A batch in memory before colour."""

    views: Tensor
    labels: Tensor
    keys: NDArray[np.int64]
    sizes: list[tuple[int, int]]
    indices: NDArray[np.int64]


class _Reading:
    """What training and evaluation share: reading and decoding."""

    def __init__(
        self,
        data: SegmentationImages,
        seed: int,
        decoder: Literal["auto", "dali", "pil"],
        bad_images: BadImages | None,
        threads: int | None,
        prefetch: int,
    ) -> None:
        self.data, self.prefetch = data, prefetch
        self.threads = threads if threads is not None else min(8, len(os.sched_getaffinity(0)))
        if self.threads < 1 or prefetch < 1:
            raise ValueError(f"threads and prefetch must be at least 1, got {threads} and {prefetch}")
        dali = decoder == "dali" or (decoder == "auto" and has_dali())
        self._decoder: Decoder = DaliDecoder(self.threads) if dali else PilDecoder()
        self.bad_images = bad_images if bad_images is not None else BadImages(len(data))
        self.reader = ScreenedReader(data.source, seed, self.bad_images, self.threads)
        self._workers = ThreadPoolExecutor(self.threads, thread_name_prefix="beit_fast-crop")

    def close(self) -> None:
        """End the threads. Nothing can be made afterwards."""
        self.reader.close()
        self._workers.shutdown(cancel_futures=True)


class SegmentationLoader(_Reading):
    """Random crops of labelled images; `batches(requests)` works ahead in a thread.

    An image that cannot be used, or whose label file is missing or damaged, is replaced by the next one of the epoch's
    order. A label map of another size, or with a number that is no class, ends the run with a ValueError that names it.
    """

    def __init__(
        self,
        data: SegmentationImages,
        sampling: SegmentationCropSampler,
        photometric: PhotometricDistortion | None,
        *,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: str | torch.device = "cpu",
        decoder: Literal["auto", "dali", "pil"] = "auto",
        bad_images: BadImages | None = None,
        threads: int | None = None,
        prefetch: int = 2,
    ) -> None:
        super().__init__(data, seed, decoder, bad_images, threads, prefetch)
        compiled_module()  # says now what is missing
        self.seed, self.sampling, self.photometric = seed, sampling, photometric
        self.device = torch.device(device)
        self.mean, self.std = tuple(mean), tuple(std)
        self._running: Prefetcher[SegmentationBatch | _Raw] | None = None

    def batches(self, requests: Iterable[Request]) -> Iterator[SegmentationBatch]:
        """One batch per request (`epoch`, `positions`), in order. One iteration at a time."""
        prefetcher = Prefetcher(self._make_all(requests), self.prefetch)
        self._running = prefetcher
        try:
            for made in prefetcher:
                yield made if isinstance(made, SegmentationBatch) else self._finish(made)
        finally:
            prefetcher.close()

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
        super().close()

    def _make_all(self, requests: Iterable[Request]) -> Iterator[SegmentationBatch | _Raw]:
        """Reads the files of one batch while the batch before it is decoded; colours on a CPU belong to it, too."""
        reading: deque[tuple[int, list[Future[Sample]]]] = deque()
        for request in requests:
            reading.append((request.epoch, self.reader.start(request.epoch, request.positions.tolist())))
            if len(reading) > 1:
                yield self._make(*reading.popleft())
        while reading:
            yield self._make(*reading.popleft())

    def _make(self, epoch: int, futures: list[Future[Sample]]) -> SegmentationBatch | _Raw:
        samples, side = [future.result() for future in futures], self.sampling.crop
        views = torch.zeros(len(samples), side, side, 3, dtype=torch.uint8)
        labels = np.full((len(samples), side, side), IGNORE, np.int64)
        keys, sizes = np.zeros(len(samples), np.int64), [(side, side)] * len(samples)

        def fill(
            entry: tuple[int, Placement, NDArray[np.int64]], crop: Crop | Rejection
        ) -> tuple[int, Rejection | None]:
            row, placement, label = entry
            if isinstance(crop, Rejection):
                return row, crop
            (height, width), sizes[row] = placement.size, placement.size
            view, label = bilinear(crop, placement.size), nearest(label, placement.size)
            views[row, :height, :width] = view.flip(1) if placement.flip else view
            labels[row, :height, :width] = label[:, ::-1] if placement.flip else label
            return row, None

        waiting = list(range(len(samples)))
        while waiting:  # again for the replacements of what could not be used
            for row in waiting:
                keys[row] = int(sample_keys(self.seed, epoch, [samples[row].index])[0])
            found = list(self._workers.map(self._place, (samples[row] for row in waiting), keys[waiting].tolist()))
            placed = [(row, *f) for row, f in zip(waiting, found, strict=True) if not isinstance(f, Rejection)]
            failed = {row: f for row, f in zip(waiting, found, strict=True) if isinstance(f, Rejection)}
            windows = np.array([placement.window for _, placement, _ in placed], np.int32).reshape(-1, 4)
            crops = self._decoder.decode([samples[row].data for row, _, _ in placed], windows) if placed else []

            failed |= {r: f for r, f in self._workers.map(fill, placed, crops) if f is not None}
            for row, rejection in failed.items():
                samples[row] = self.reader.after(epoch, samples[row], rejection.reason)
            waiting = sorted(failed)
        indices = np.array([sample.index for sample in samples], np.int64)
        raw = _Raw(views, torch.from_numpy(labels), keys, sizes, indices)
        return self._finish(raw) if self.device.type == "cpu" else raw

    def _place(self, sample: Sample, key: int) -> tuple[Placement, NDArray[np.int64]] | Rejection:
        """The crop of a sample and its part of the label map."""
        label = self.data.read_label(sample.index, sample.header)
        if isinstance(label, Rejection):
            return label
        placement = self.sampling.sample(key, label)
        top, left, height, width = placement.window
        return placement, label[top : top + height, left : left + width]

    def _finish(self, raw: _Raw) -> SegmentationBatch:
        """Colours, normalisation and padding, on the device."""
        levels = self._send(raw.views).permute(0, 3, 1, 2).float()
        if self.photometric is not None:
            levels = distort(levels, self.photometric.sample(raw.keys))
        images = normalised(levels, self.mean, self.std).contiguous()
        for row, (height, width) in enumerate(raw.sizes):
            images[row, :, height:] = 0
            images[row, :, :, width:] = 0
        keys = self._send(torch.from_numpy(raw.keys))
        return SegmentationBatch(images, self._send(raw.labels), keys, torch.from_numpy(raw.indices))

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


def normalised(levels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Levels (..., 3, H, W) in [0, 255] -> (levels / 255 - mean) / std."""
    shift, scale = (levels.new_tensor(values)[:, None, None] * 255 for values in (mean, std))
    return (levels - shift) / scale


class WholeImage(NamedTuple):
    """One image for evaluation, in memory."""

    number: int
    """Its place in the source."""
    pixels: Tensor
    """uint8 (H, W, 3)"""
    label: Tensor
    """int64 (H, W)"""


class WholeImages(_Reading):
    """Every image of a set once, whole. A bad one is left out, reported to `bad_images` and named there."""

    def __init__(
        self,
        data: SegmentationImages,
        *,
        decoder: Literal["auto", "dali", "pil"] = "auto",
        bad_images: BadImages | None = None,
        threads: int | None = None,
        prefetch: int = 2,
    ) -> None:
        super().__init__(data, 0, decoder, bad_images, threads, prefetch)

    def images(self, rank: int = 0, size: int = 1) -> Iterator[WholeImage]:
        """This rank's share: `rank`, `rank + size`, ..."""
        prefetcher = Prefetcher(self._read(range(rank, len(self.data), size)), self.prefetch)
        try:
            yield from prefetcher
        finally:
            prefetcher.close()

    def _read(self, own: range) -> Iterator[WholeImage]:
        for first in range(0, len(own), self.threads):
            chunk = own[first : first + self.threads]
            read = [future.result() for future in self.reader.start_reading(chunk)]
            kept = [(index, *found) for index, found in zip(chunk, read, strict=True) if found is not None]
            if not kept:
                continue
            labels = list(self._workers.map(self.data.read_label, *zip(*((i, h) for i, _, h in kept), strict=True)))
            whole = np.array([(0, 0, header.height, header.width) for _, _, header in kept], np.int32)
            pictures = self._decoder.decode([data for _, data, _ in kept], whole)
            for (index, _, _), picture, label in zip(kept, pictures, labels, strict=True):
                bad = next((part for part in (picture, label) if isinstance(part, Rejection)), None)
                if bad is not None:
                    self.bad_images.add(self.data.source.name(index), bad.reason)
                    continue
                pixels = torch.from_numpy(np.array(picture))  # a copy: the decoder's buffer is used again
                yield WholeImage(index, pixels, torch.from_numpy(np.asarray(label)))
