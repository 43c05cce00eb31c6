"""What all loaders share: requests, screened reading in threads, replacement of bad images, batches made ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.data.arrays.decoding import ArrayDecoder
from beit_fast.data.augmentation.color_jitter import gray_means, jitter_floats, mean_gray
from beit_fast.data.decoding import Decoder, open_decoder
from beit_fast.data.prefetch import Prefetcher
from beit_fast.data.reading import NOTHING_USABLE, Sample, ScreenedReader, common_kind, decode
from beit_fast.data.sampling import CropSampler, Views, compiled_module
from beit_fast.data.screening import BadImages, Rejection
from beit_fast.data.sources import ImageSource
from beit_fast.kernels import color_jitter

NORMALIZATION = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
"""Mean and standard deviation of each channel of images in [0, 1]."""
T = TypeVar("T")


class Request(NamedTuple):
    """One batch to make."""

    epoch: int
    positions: NDArray[np.int64]
    """(b,) positions in the shuffled order of the epoch, each in [0, number of samples)."""


class Loader:
    """Base of the loaders: threads, a screened reader, and batches that are made ahead of their use.

    Args:
        source: the images.
        seed: of the order of the epochs.
        device: where batches are to lie.
        bad_images: is told of images that cannot be used; None: one of its own, which allows 1 %.
        threads: that decode and resize; None: the cores of this process, at most 8.
        prefetch: batches that are made ahead.
        channels: of the images, which then keep their depth (`ArrayDecoder`); None: all become RGB of 8 bits.
        value_range: values of float pixels that become black and white; None refuses such images. With `channels`, of
            pixels of any type.

    Raises:
        ValueError: an empty source, images of other channels or of several depths, or fewer than one thread or batch.
        ModuleNotFoundError: `beit_fast._C` was not built.
    """

    def __init__(
        self, source: ImageSource, *, seed: int = 0, device: str | torch.device = "cpu",
        bad_images: BadImages | None = None, threads: int | None = None, prefetch: int = 2,
        channels: int | None = None, value_range: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        self.source, self.seed, self.device, self.prefetch = source, seed, torch.device(device), prefetch
        self.threads = threads if threads is not None else min(8, len(os.sched_getaffinity(0)))
        for name, value in (("threads", self.threads), ("prefetch", prefetch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.bad_images = bad_images if bad_images is not None else BadImages(len(source))
        self.compiled = compiled_module()
        self.channels, self.value_range = channels, value_range
        kind = None if channels is None else common_kind(source, channels, value_range)
        self.reader = ScreenedReader(source, seed, self.bad_images, self.threads, kind)
        self.workers = ThreadPoolExecutor(self.threads, thread_name_prefix="beit_fast-resize")
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._running: list[Prefetcher[Any]] = []

    def close(self) -> None:
        """End the threads; batches that were made ahead are dropped. Nothing can be made afterwards."""
        for prefetcher in self._running:
            prefetcher.close()
        self._running.clear()
        self.reader.close()
        self.workers.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ahead(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield `batches`, dataclasses, that a thread of its own makes; on a GPU, in a stream of its own."""
        prefetcher = Prefetcher(self._with_events(batches), self.prefetch)
        self._running.append(prefetcher)
        try:
            for batch, complete in prefetcher:
                if complete is not None:
                    _wait_for(batch, complete)
                yield batch
        finally:
            prefetcher.close()
            if prefetcher in self._running:
                self._running.remove(prefetcher)

    def _with_events(self, batches: Iterator[T]) -> Iterator[tuple[T, torch.cuda.Event | None]]:
        """Each batch with the event after which it is complete; None on a CPU."""
        while True:
            with torch.cuda.stream(self._stream):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch, None if self._stream is None else self._stream.record_event()

    def read_ahead(self, requests: Iterable[Request], repeats: int = 1) -> Iterator[tuple[Request, list[Sample]]]:
        """Yield requests with their samples; the files of one are read while the one before it is worked on.

        With `repeats`, position p stands for p // repeats of the epoch's order.
        """
        reading: deque[tuple[Request, Iterator[Sample]]] = deque()
        for request in requests:
            reading.append((request, self.reader.start(request.epoch, np.asarray(request.positions) // repeats)))
            if len(reading) > 1:
                request, samples = reading.popleft()
                yield request, list(samples)
        for request, samples in reading:
            yield request, list(samples)

    def draw(self, sampler: CropSampler, epoch: int, samples: Sequence[Sample]) -> Views:
        """Draw the windows, flips and colours of samples."""
        return sampler.sample(
            self.seed, epoch, [sample.index for sample in samples],
            [sample.header.height for sample in samples], [sample.header.width for sample in samples],
        )  # fmt: skip

    def make_all(
        self, epoch: int, samples: list[Sample], make: Callable[[list[int]], dict[int, Rejection]]
    ) -> NDArray[np.int64]:
        """Make every sample of a batch, those that cannot be decoded replaced, in `samples` too.

        Args:
            epoch: that of the batch.
            samples: (b,).
            make: is called with rows of the batch, and again with those that were replaced; returns what it could
                not decode.

        Returns:
            int64 (b,): indices of the samples in the source.

        Raises:
            ValueError: not one image can be used.
        """
        rows = list(range(len(samples)))
        for _ in range(len(self.source) + 1):
            failed = make(rows)
            for row, rejection in failed.items():
                samples[row] = self.reader.after(epoch, samples[row], rejection.reason)
            rows = sorted(failed)
            if not rows:
                return np.array([sample.index for sample in samples], np.int64)
        raise ValueError(NOTHING_USABLE)

    def decode_whole(self, decoder: Decoder | ArrayDecoder, indices: Sequence[int]) -> list[tuple[Sample, Any]]:
        """Read and decode whole images; what cannot be used is reported and left out."""
        samples = [sample for sample in self.reader.read_all(indices) if sample is not None]
        windows = np.array([(0, 0, s.header.height, s.header.width) for s in samples], np.int32).reshape(-1, 4)
        decoded = []
        for sample, pixels in zip(samples, decode(decoder, samples, windows), strict=True):
            if isinstance(pixels, Rejection):
                self.bad_images.add(self.source.name(sample.index), pixels.reason)
            else:
                decoded.append((sample, pixels))
        return decoded

    def open_decoder(self, name: str) -> Decoder | ArrayDecoder:
        """Open the decoder "dali", "pil" or "auto" for the images as they are to be read."""
        if self.channels is None:
            return open_decoder(name, self.threads, self.value_range)
        return ArrayDecoder(name, self.threads, self.value_range)

    def gray_means(self, views: Tensor) -> Tensor:
        """Mean gray level float32 (b,) of views (b, H, W, C)."""
        return gray_means(views) if views.is_cuda else torch.from_numpy(mean_gray(views.numpy()))

    def transform(
        self, views: Tensor, flips: Tensor, factors: Tensor, centers: Tensor, mean: Sequence[float],
        std: Sequence[float],
    ) -> Tensor:  # fmt: skip
        """Jitter, flip and normalise views (b, H, W, C): float32 (b, C, H, W). All tensors are on the device.

        `centers` float32 (b,): the gray level that contrast leaves alone.
        """
        if views.dtype != torch.uint8:
            return jitter_floats(views, flips, factors, centers, mean, std)
        if views.is_cuda:
            return color_jitter(views, flips, factors, centers, mean, std)
        arrays = (tensor.numpy() for tensor in (views, flips, factors, centers))
        return torch.from_numpy(self.compiled.transform_views(*arrays, mean, std, threads=self.threads))

    def normalise(self, views: Tensor, flips: NDArray[np.bool_], mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Flip and normalise views (b, H, W, C) in memory: float32 (b, C, H, W) on the device of the loader."""
        factors, centers = self.send(torch.ones(len(views), 3)), self.send(torch.zeros(len(views)))
        return self.transform(self.send(views), self.send(torch.from_numpy(flips)), factors, centers, mean, std)

    def send(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device, without waiting for the copy."""
        if tensor.device.type == self.device.type:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _wait_for(batch: Any, complete: torch.cuda.Event) -> None:
    """Let the consumer's stream wait for the batch, and keep its memory until that stream is done with it."""
    stream = torch.cuda.current_stream()
    stream.wait_event(complete)
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor) and value.is_cuda:
            value.record_stream(stream)
