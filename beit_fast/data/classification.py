"""Labelled views: random crops with RandAugment and erasing for training, the exact centre crop for evaluation.

Training (paper, table 13; official order): a random resized crop (bicubic), flip, RandAugment, normalisation, random
erasing. All of it is drawn from (seed, epoch, sample, repetition), so a batch has the same content however the epoch is
split. Mixup and CutMix belong to the batch and stand in `mix`.

Decoding is DALI's, of the crop window only; the resize is torch's antialiased one on bytes (within 0.03 levels of
Pillow's on average), the same in training and evaluation.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.data.augmentation.erasing import RandomErasing
from beit_fast.data.augmentation.rand_augment import Augmenter, RandAugment
from beit_fast.data.decoding import Crop, DaliDecoder, Decoder, PilDecoder, has_dali
from beit_fast.data.loader import Request
from beit_fast.data.prefetch import Prefetcher
from beit_fast.data.reading import Sample, ScreenedReader
from beit_fast.data.sampling import CropSampler, compiled_module, sample_keys
from beit_fast.data.screening import BadImages, Rejection
from beit_fast.data.sources import ImageSource
from beit_fast.kernels import color_jitter

Triple = Sequence[float]


@dataclass(frozen=True)
class LabelledBatch:
    """A batch on the device of its views, except `indices` and `rectangles`."""

    images: Tensor
    """float32 (b, 3, S, S), normalised."""
    labels: Tensor
    """int64 (b,)."""
    sample_keys: Tensor
    """int64 (b,): for drop path and erasing."""
    indices: Tensor
    """int64 (b,): places in the source, replacements of bad images included."""
    rectangles: NDArray[np.int64] | None = None
    """(b, 4) what is to be erased: top, left, height, width; None: nothing."""

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


class _Views:
    """What training and evaluation views share: reading, decoding, resizing, normalising."""

    def __init__(
        self,
        source: ImageSource,
        labels: NDArray[np.integer],
        *,
        seed: int,
        image_size: int,
        mean: Triple,
        std: Triple,
        device: str | torch.device,
        decoder: Literal["auto", "dali", "pil"],
        bad_images: BadImages | None,
        threads: int | None,
        prefetch: int,
    ) -> None:
        if len(labels) != len(source):
            raise ValueError(f"labels: {len(labels)} for {len(source)} images")
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        self.source, self.labels = source, np.asarray(labels, np.int64)
        self.image_size, self.mean, self.std = image_size, tuple(mean), tuple(std)
        self.device = torch.device(device)
        self.threads = threads if threads is not None else min(8, len(os.sched_getaffinity(0)))
        if self.threads < 1 or prefetch < 1:
            raise ValueError(f"threads and prefetch must be at least 1, got {threads} and {prefetch}")
        self.prefetch = prefetch
        if decoder not in ("auto", "dali", "pil"):
            raise ValueError(f"decoder must be auto, dali or pil, got {decoder!r}")
        dali = decoder == "dali" or (decoder == "auto" and has_dali())
        self._decoder: Decoder = DaliDecoder(self.threads) if dali else PilDecoder()
        self.bad_images = bad_images if bad_images is not None else BadImages(len(source))
        self.reader = ScreenedReader(source, seed, self.bad_images, self.threads)
        self._workers = ThreadPoolExecutor(self.threads, thread_name_prefix="beit_fast-resize")
        self._compiled = compiled_module()

    def close(self) -> None:
        """End the threads. Nothing can be made afterwards."""
        self.reader.close()
        self._workers.shutdown(cancel_futures=True)

    def _normalised(self, views: Tensor, flips: NDArray[np.bool_]) -> Tensor:
        """Bytes (b, S, S, 3) in memory to float32 (b, 3, S, S) on the device, flipped where asked for."""
        factors = np.ones((len(views), 3), np.float32)
        centers = np.zeros(len(views), np.float32)
        if self.device.type == "cpu":
            out = torch.empty(len(views), 3, self.image_size, self.image_size)
            self._compiled.transform_views(
                views.numpy(), flips, factors, centers, self.mean, self.std, out.numpy(), threads=self.threads
            )
            return out
        flip, factor, center = (self._send(torch.from_numpy(values)) for values in (flips, factors, centers))
        return color_jitter(self._send(views), flip, factor, center, self.mean, self.std)

    def _send(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


class ClassificationLoader(_Views):
    """Random views of a labelled source; `batches(requests)` works ahead in a thread.

    A position p of an epoch is view p % repeats of the image at place p // repeats of the epoch's order. An image that
    cannot be used is replaced by the next one of that order, with its label. `labels` (n,) one class per image.

    ValueError where arguments do not fit; ModuleNotFoundError where `beit_fast._C`, or DALI for RandAugment, lacks.
    """

    def __init__(
        self,
        source: ImageSource,
        labels: NDArray[np.integer],
        augmentation: Augmentation,
        *,
        seed: int,
        image_size: int = 224,
        mean: Triple = (0.5, 0.5, 0.5),
        std: Triple = (0.5, 0.5, 0.5),
        device: str | torch.device = "cpu",
        decoder: Literal["auto", "dali", "pil"] = "auto",
        bad_images: BadImages | None = None,
        threads: int | None = None,
        prefetch: int = 2,
    ) -> None:
        super().__init__(
            source, labels, seed=seed, image_size=image_size, mean=mean, std=std, device=device, decoder=decoder,
            bad_images=bad_images, threads=threads, prefetch=prefetch,
        )  # fmt: skip
        self.seed, self.augmentation = seed, augmentation
        self._sampling = CropSampler(augmentation.scale, augmentation.ratio, augmentation.flip_probability, 0, 0, 0)
        self._augmenter = Augmenter(self.threads) if augmentation.rand_augment is not None else None
        self._running: Prefetcher[tuple[Tensor, NDArray[np.bool_], LabelledBatch]] | None = None

    def batches(self, requests: Iterable[Request]) -> Iterator[LabelledBatch]:
        """One batch per request (`epoch`, `positions`), in order. One iteration at a time."""
        prefetcher = Prefetcher(self._make_all(requests), self.prefetch)
        self._running = prefetcher
        try:
            for views, flips, batch in prefetcher:
                if self.device.type == "cpu":
                    yield batch
                    continue
                yield replace(
                    batch,
                    images=self._normalised(views, flips),
                    labels=self._send(batch.labels),
                    sample_keys=self._send(batch.sample_keys),
                )
        finally:
            prefetcher.close()

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
        super().close()

    def _make_all(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, NDArray[np.bool_], LabelledBatch]]:
        """Reads the files of one batch while the batch before it is decoded."""
        reading: deque[tuple[int, NDArray[np.int64], list[Future[Sample]]]] = deque()
        for request in requests:
            places, repetition = np.divmod(np.asarray(request.positions, np.int64), self.augmentation.repeats)
            reading.append((request.epoch, repetition, self.reader.start(request.epoch, places.tolist())))
            if len(reading) > 1:
                yield self._make(*reading.popleft())
        while reading:
            yield self._make(*reading.popleft())

    def _make(
        self, epoch: int, repetition: NDArray[np.int64], futures: list[Future[Sample]]
    ) -> tuple[Tensor, NDArray[np.bool_], LabelledBatch]:
        samples = [future.result() for future in futures]
        views = torch.empty(len(samples), self.image_size, self.image_size, 3, dtype=torch.uint8)
        flips, waiting = np.zeros(len(samples), np.bool_), np.arange(len(samples))
        while len(waiting):  # again for the replacements of what could not be decoded
            windows, flips[waiting] = self._draw(epoch, repetition[waiting], [samples[row] for row in waiting])
            crops = self._decoder.decode([samples[row].data for row in waiting], windows)
            list(self._workers.map(self._resize_into, (views[row] for row in waiting), crops))
            failed = [(row, crop) for row, crop in zip(waiting, crops, strict=True) if isinstance(crop, Rejection)]
            for row, rejection in failed:
                samples[row] = self.reader.after(epoch, samples[row], rejection.reason)
            waiting = np.array([row for row, _ in failed], np.int64)
        indices = np.array([sample.index for sample in samples], np.int64)
        keys = np.empty(len(samples), np.int64)
        for turn in np.unique(repetition):
            rows = repetition == turn
            keys[rows] = sample_keys(self.seed, self._view_epoch(epoch, turn), indices[rows]).numpy()
        rectangles = None
        if self.augmentation.rand_augment is not None and self._augmenter is not None:
            self._augmenter.apply(views, self.augmentation.rand_augment.sample(keys))
        if self.augmentation.erasing is not None:
            rectangles = self.augmentation.erasing.sample(keys, (self.image_size, self.image_size))
        on_cpu = self.device.type == "cpu"
        images = self._normalised(views, flips) if on_cpu else torch.empty(0)
        labels = torch.from_numpy(self.labels[indices])
        batch = LabelledBatch(images, labels, torch.from_numpy(keys), torch.from_numpy(indices), rectangles)
        return views, flips, batch

    def _view_epoch(self, epoch: int, turn: int) -> int:
        """Repetitions are told apart by counting epochs as many times."""
        return epoch * self.augmentation.repeats + int(turn)

    def _draw(
        self, epoch: int, repetition: NDArray[np.int64], samples: list[Sample]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        windows, flips = np.empty((len(samples), 4), np.int32), np.empty(len(samples), np.bool_)
        for turn in np.unique(repetition):
            rows = np.flatnonzero(repetition == turn)
            headers = [samples[row].header for row in rows]
            windows[rows], flips[rows], _ = self._sampling.sample(
                self.seed,
                self._view_epoch(epoch, turn),
                [samples[row].index for row in rows],
                [header.height for header in headers],
                [header.width for header in headers],
            )
        return windows, flips

    def _resize_into(self, out: Tensor, crop: Crop | Rejection) -> None:
        if not isinstance(crop, Rejection):
            out.copy_(resized(crop, (self.image_size, self.image_size)))


class EvaluationLoader(_Views):
    """Centre crops of a labelled source, with torchvision's geometry (`evaluation_geometry`).

    A bad image is left out, reported to `bad_images` and named there; it cannot be replaced.
    """

    def __init__(
        self,
        source: ImageSource,
        labels: NDArray[np.integer],
        *,
        image_size: int = 224,
        crop_share: float | None = None,
        mean: Triple = (0.5, 0.5, 0.5),
        std: Triple = (0.5, 0.5, 0.5),
        device: str | torch.device = "cpu",
        decoder: Literal["auto", "dali", "pil"] = "auto",
        bad_images: BadImages | None = None,
        threads: int | None = None,
        prefetch: int = 2,
    ) -> None:
        super().__init__(
            source, labels, seed=0, image_size=image_size, mean=mean, std=std, device=device, decoder=decoder,
            bad_images=bad_images, threads=threads, prefetch=prefetch,
        )  # fmt: skip
        self.crop_share = default_crop_share(image_size) if crop_share is None else crop_share
        if not 0 < self.crop_share <= 1:
            raise ValueError(f"crop_share must be in (0, 1], got {crop_share}")

    def batches(self, batch_size: int, rank: int = 0, size: int = 1) -> Iterator[LabelledBatch]:
        """Every image of this rank's share (`rank`, `rank + size`, ...) once; nothing is padded."""
        own = np.arange(rank, len(self.source), size, dtype=np.int64)
        chunks = (own[start : start + batch_size] for start in range(0, len(own), batch_size))
        prefetcher = Prefetcher(self._make_all(chunks), self.prefetch)
        try:
            for views, indices in prefetcher:
                labels = torch.from_numpy(self.labels[indices])
                images = self._normalised(views, np.zeros(len(views), np.bool_))
                keys = torch.zeros(len(views), dtype=torch.int64, device=self.device)
                yield LabelledBatch(images, self._send(labels), keys, torch.from_numpy(indices))
        finally:
            prefetcher.close()

    def _make_all(self, chunks: Iterable[NDArray[np.int64]]) -> Iterator[tuple[Tensor, NDArray[np.int64]]]:
        for chunk in chunks:
            read = [future.result() for future in self.reader.start_reading(chunk.tolist())]
            kept = [(index, *found) for index, found in zip(chunk.tolist(), read, strict=True) if found is not None]
            if not kept:
                continue
            whole = np.array([(0, 0, header.height, header.width) for _, _, header in kept], np.int32)
            pictures = self._decoder.decode([data for _, data, _ in kept], whole)
            views, indices = [], []
            for (index, _, _), view in zip(kept, self._workers.map(self._centre, pictures), strict=True):
                if isinstance(view, Rejection):
                    self.bad_images.add(self.source.name(index), view.reason)
                else:
                    views.append(view)
                    indices.append(index)
            if views:
                yield torch.stack(views), np.array(indices, np.int64)

    def _centre(self, picture: Crop | Rejection) -> Tensor | Rejection:
        if isinstance(picture, Rejection):
            return picture
        return centre_view(picture, self.image_size, self.crop_share)


def default_crop_share(image_size: int) -> float:
    """The official code's: 224/256 below 384 pixels, the whole image from there on."""
    return 224 / 256 if image_size < 384 else 1.0


def evaluation_geometry(height: int, width: int, image_size: int, crop_share: float) -> tuple[int, int, int, int]:
    """(height, width) of the resized image and (top, left) of its centre crop, as torchvision computes them.

    The short side becomes int(image_size / crop_share) and the long one keeps the ratio, rounded down; the crop's
    corner is rounded to even halves. DALI's `resize_shorter` rounds otherwise and is off by up to a pixel.
    """
    short = int(image_size / crop_share)
    if height <= width:
        resized_height, resized_width = short, int(short * width / height)
    else:
        resized_height, resized_width = int(short * height / width), short
    return (
        resized_height,
        resized_width,
        round((resized_height - image_size) / 2.0),
        round((resized_width - image_size) / 2.0),
    )


def centre_view(picture: Crop, image_size: int, crop_share: float) -> Tensor:
    """The evaluation view uint8 (S, S, 3) of a picture (h, w, 3)."""
    height, width, top, left = evaluation_geometry(picture.shape[0], picture.shape[1], image_size, crop_share)
    return resized(picture, (height, width))[top : top + image_size, left : left + image_size]


def resized(picture: Crop, size: tuple[int, int]) -> Tensor:
    """uint8 (h, w, 3) resized to `size` (H, W): bicubic, antialiased; (H, W, 3)."""
    # The channels-last layout takes torch's vector code: seven times faster than planes.
    image = torch.from_numpy(np.require(picture, requirements=["C", "W"])).permute(2, 0, 1)[None]
    if tuple(picture.shape[:2]) == size:
        return image[0].permute(1, 2, 0)
    return F.interpolate(image, size=size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
