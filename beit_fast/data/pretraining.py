"""The two views of pre-training: the model's image and the tokenizer's, from one crop, with one mask.

Per sample (paper, section 2.5 and appendix; the official order differs as said below): a window of 8 to 100 % of the
area, resized to `image_size` (bicubic) and to `token_image_size` (Lanczos), both with the same colour jitter and flip;
the first is normalised for the model, the second left in [0, 1] for the tokenizer. Everything random comes from
`sampling`, keyed by (seed, epoch, sample): a batch has the same content however the epoch is split.

Where this differs from the official transforms (distances in levels of 255, at equal windows, flips and factors, over
the seven built-in photographs in 20 views each, 224 px):
- jitter comes after the crop and the resize, which clips other pixels: 0.6 on average;
- contrast is about the mean gray of the view, not of the whole image: together 2.2 on average (a jitter of 40 % moves
  levels by tens). `jitter_center="image"` takes the whole image and therefore decodes all of it;
- the order is always brightness, contrast, saturation; there it is random;
- EXIF rotation is applied; there it is not.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from beit_fast.data.augmentation.color_jitter import gray_means
from beit_fast.data.decoding import DaliDecoder, Decoder, PilDecoder, has_dali
from beit_fast.data.loader import Request
from beit_fast.data.prefetch import Prefetcher
from beit_fast.data.resizing import CpuResizer, GpuResizer, ResizedViews, Resizer
from beit_fast.data.sampling import BlockwiseMasking, CropSampler, compiled_module, epoch_order, sample_keys
from beit_fast.data.screening import BadImages, Header, Rejection, read_screened
from beit_fast.data.sources import ImageSource
from beit_fast.data.token_store import TokenStore
from beit_fast.kernels import color_jitter

_NOTHING_USABLE = "source: not one of its images can be used"


@dataclass(frozen=True)
class PretrainBatch:
    """One batch; on the device of its `PretrainLoader` except `indices` and `unknown`."""

    images: Tensor
    """float32 (b, 3, S, S), normalised"""
    token_images: Tensor
    """float32 (b, 3, s, s) in [0, 1]; with a token store only those of `unknown`, (u, 3, s, s)"""
    mask: Tensor
    """bool (b, h, w), True where masked"""
    indices: Tensor
    """int64 (b,): samples of the source, replacements of bad images included"""
    sample_keys: Tensor
    """int64 (b,): for drop path"""
    masked_indices: Tensor
    """int64 (M,): `mask.flatten().nonzero()`, known beforehand so that nobody waits for a GPU to count"""
    epoch: int
    known_tokens: Tensor | None = None
    """int64 (b, h, w) from the token store, where there is one; nothing of use at `unknown`"""
    unknown: Tensor | None = None
    """int64 (u,), on the CPU: rows of the batch whose tokens are not in the store yet"""

    def __len__(self) -> int:
        return len(self.images)


class _Resized(NamedTuple):
    """A batch before colour, and what the token store knows of it: tokens (b, P) and whether they are there (b,)."""

    views: ResizedViews
    flips: NDArray[np.bool_]
    factors: NDArray[np.float32]
    tokens: NDArray[np.uint16] | None
    known: NDArray[np.bool_]


_Made = tuple[PretrainBatch, torch.cuda.Event | None]
"""A batch and, on a GPU, the event after which it is complete."""


@dataclass(frozen=True)
class _Sample:
    """An image that passed the screening."""

    position: int
    index: int
    data: bytes
    header: Header


class PretrainLoader:
    """Makes pre-training batches from a source of encoded images.

    `batches(requests)` works ahead in a thread, `prefetch` batches deep. `mean` and `std` normalise `images`.
    `device="cuda"` gives batches on the GPU. `decoder`: "dali" (CPU), "dali-gpu" (nvJPEG; the resize is DALI's too),
    "pil", or "auto" = "dali-gpu" on CUDA and "dali" elsewhere, "pil" where DALI is missing. The GPU path was written
    without a GPU at hand: it is unverified.

    An image that cannot be read or decoded is replaced by the sample at the next place of the epoch's order,
    (position + 1) modulo the length and so on, and reported to `bad_images`, which raises `TooManyBadImages`.

    `view_cycle=K` repeats windows, flips and colours every K epochs; order, masks and drop path are those of the
    epoch. A `token_store` (its cycle is K) brings the tokens of views it knows; tokenizer views are made of the others.

    ValueError where arguments do not fit together; ModuleNotFoundError where `beit_fast._C` or DALI is missing.
    """

    def __init__(
        self,
        source: ImageSource,
        masking: BlockwiseMasking,
        views: CropSampler,
        *,
        seed: int,
        image_size: int = 224,
        token_image_size: int = 112,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        device: str | torch.device = "cpu",
        decoder: Literal["auto", "dali", "dali-gpu", "pil"] = "auto",
        jitter_center: Literal["view", "image"] = "view",
        bad_images: BadImages | None = None,
        threads: int | None = None,
        prefetch: int = 2,
        view_cycle: int | None = None,
        token_store: TokenStore | None = None,
    ) -> None:
        if len(source) == 0:
            raise ValueError("source: no images")
        for name, size in (("image_size", image_size), ("token_image_size", token_image_size)):
            if size < 1 or size % masking.grid[0] or size % masking.grid[1]:
                raise ValueError(f"{name} {size} is not a multiple of the mask's grid {masking.grid}")
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, got {prefetch}")
        if view_cycle is not None and view_cycle < 1:
            raise ValueError(f"view_cycle must be at least 1, got {view_cycle}")
        if token_store is not None and (
            token_store.cycle != view_cycle or token_store.num_tokens != masking.grid[0] * masking.grid[1]
        ):
            raise ValueError(
                f"token_store holds {token_store.num_tokens} tokens per view in a cycle of {token_store.cycle}; the "
                f"grid is {masking.grid} and view_cycle {view_cycle}"
            )
        self.view_cycle, self.token_store = view_cycle, token_store
        self.source, self.masking, self.views, self.seed = source, masking, views, seed
        self.image_size, self.token_image_size = image_size, token_image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.device = torch.device(device)
        self.jitter_center = jitter_center
        self.bad_images = bad_images if bad_images is not None else BadImages(len(source))
        self.threads = threads if threads is not None else min(8, len(os.sched_getaffinity(0)))
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.prefetch = prefetch
        self._compiled = compiled_module()
        # Reading waits for disks and networks, so it has threads of its own, and more of them than there are cores.
        self._num_readers = max(8, self.threads)
        self._readers = ThreadPoolExecutor(self._num_readers, thread_name_prefix="beit_fast-read")
        self._workers = ThreadPoolExecutor(self.threads, thread_name_prefix="beit_fast-resize")
        self._resizer = self._make_resizer(resolve_decoder(decoder, self.device))
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._running: list[Prefetcher[_Made]] = []
        self._one_at_a_time = threading.Lock()  # a decoder has one set of buffers

    def batches(self, requests: Iterable[Request]) -> Iterator[PretrainBatch]:
        """One batch per request, in order. `requests` is read ahead, by another thread."""
        prefetcher = Prefetcher(self._make_all(requests), self.prefetch)
        self._running.append(prefetcher)
        try:
            for batch, ready in prefetcher:
                if ready is not None:
                    _hand_over(batch, ready)
                yield batch
        finally:
            prefetcher.close()
            if prefetcher in self._running:
                self._running.remove(prefetcher)

    def close(self) -> None:
        """End the threads; batches that were made ahead are dropped. Nothing can be made afterwards."""
        for prefetcher in self._running:
            prefetcher.close()
        self._running.clear()
        self._readers.shutdown(cancel_futures=True)
        self._workers.shutdown(cancel_futures=True)

    def __enter__(self) -> PretrainLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_resizer(self, decoder: str) -> Resizer:
        if decoder not in ("dali", "dali-gpu", "pil"):
            raise ValueError(f"decoder must be auto, dali, dali-gpu or pil, got {decoder!r}")
        if self.jitter_center not in ("view", "image"):
            raise ValueError(f"jitter_center must be view or image, got {self.jitter_center!r}")
        if decoder == "dali-gpu":
            if self.device.type != "cuda":
                raise ValueError(f"decoder dali-gpu needs device cuda, got {self.device}")
            if self.jitter_center == "image":
                raise ValueError("jitter_center image needs decoder dali or pil")
            return GpuResizer(self.device, self.threads, self.image_size, self.token_image_size)
        on_cpu: Decoder = DaliDecoder(self.threads) if decoder == "dali" else PilDecoder()
        whole = self.jitter_center == "image"
        return CpuResizer(on_cpu, self._workers, self.image_size, self.token_image_size, whole)

    def _make_all(self, requests: Iterable[Request]) -> Iterator[_Made]:
        """Reads the files of one batch while the batch before it is decoded."""
        reading: deque[tuple[int, list[Future[list[_Sample]]]]] = deque()
        for request in requests:
            reading.append((request.epoch, self._start_reading(request)))
            if len(reading) > 1:
                yield self._make_ready(*reading.popleft())
        while reading:
            yield self._make_ready(*reading.popleft())

    def _start_reading(self, request: Request) -> list[Future[list[_Sample]]]:
        positions = np.asarray(request.positions, np.int64)
        # A task per image would cost as much as reading it from the page cache.
        if positions.ndim != 1 or len(positions) == 0:
            raise ValueError(f"positions must be a row of at least one place, got shape {positions.shape}")
        parts = np.array_split(positions, min(len(positions), 2 * self._num_readers))
        return [self._readers.submit(self._find_all, request.epoch, part.tolist()) for part in parts]

    def _find_all(self, epoch: int, positions: list[int]) -> list[_Sample]:
        return [self._find(epoch, position) for position in positions]

    def _find(self, epoch: int, position: int) -> _Sample:
        """The first image that passes the screening at or after a position of the epoch's order."""
        length = len(self.source)
        for step in range(length):
            place = position if step == 0 else (position + step) % length
            index = int(epoch_order([place], length, self.seed, epoch)[0])
            found = read_screened(self.source, index)
            self.bad_images.looked_at(1)
            if not isinstance(found, Rejection):
                return _Sample(place, index, *found)
            self.bad_images.add(self.source.name(index), found.reason)
        raise ValueError(_NOTHING_USABLE)

    def _make_ready(self, epoch: int, reading: list[Future[list[_Sample]]]) -> _Made:
        samples = [sample for future in reading for sample in future.result()]
        if self._stream is None:
            return self._make(epoch, samples), None
        with torch.cuda.stream(self._stream):
            batch = self._make(epoch, samples)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return batch, ready

    def _make(self, epoch: int, samples: list[_Sample]) -> PretrainBatch:
        resized, flips, factors, tokens, known = self._resized(epoch, samples)
        indices = np.array([sample.index for sample in samples], np.int64)
        mask = self.masking.sample(self.seed, epoch, indices)
        keys = sample_keys(self.seed, epoch, indices)
        rows = mask.flatten().nonzero().squeeze(1)
        unit = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        # Which rows the tokenizer has to see; all of them without a store.
        wanted = slice(None) if tokens is None else np.flatnonzero(~known)
        if self.device.type == "cpu":
            # Both views share the centre of the contrast: they are one picture in two sizes.
            centers = resized.centers.numpy() if resized.centers is not None else None
            if centers is None:
                centers = self._compiled.gray_means(resized.views.numpy())
            images = self._transform_on_cpu(resized.views, flips, factors, centers, self.mean, self.std)
            token_images = self._transform_on_cpu(
                resized.token_views[wanted], flips[wanted], factors[wanted], centers[wanted], *unit
            )
        else:
            views, token_views = self._send(resized.views), self._send(resized.token_views[wanted])
            flip, factor = self._send(torch.from_numpy(flips)), self._send(torch.from_numpy(factors))
            center = self._send(resized.centers) if resized.centers is not None else gray_means(views)
            images = color_jitter(views, flip, factor, center, self.mean, self.std)
            chosen = wanted if isinstance(wanted, slice) else self._send(torch.from_numpy(wanted))
            token_images = color_jitter(token_views, flip[chosen], factor[chosen], center[chosen], *unit)
            mask, keys, rows = self._send(mask), self._send(keys), self._send(rows)
        batch = PretrainBatch(images, token_images, mask, torch.from_numpy(indices), keys, rows, epoch)
        if tokens is None:
            return batch
        known_tokens = torch.from_numpy(tokens.astype(np.int64)).view(len(samples), *self.masking.grid)
        if self.device.type != "cpu":
            known_tokens = self._send(known_tokens)
        return replace(batch, known_tokens=known_tokens, unknown=torch.from_numpy(np.flatnonzero(~known)))

    def _view_epoch(self, epoch: int) -> int:
        return epoch if self.view_cycle is None else epoch % self.view_cycle

    def _resized(self, epoch: int, samples: list[_Sample]) -> _Resized:
        """Both views of the samples, with what fails to decode replaced, in `samples` too."""
        tokens, known = None, np.zeros(len(samples), np.bool_)
        if self.token_store is not None:
            tokens, known = self.token_store.read(epoch, np.array([sample.index for sample in samples], np.int64))
        resized, flips, factors = self._decode(epoch, samples, known)
        for row, rejection in resized.rejected.items():
            reason = rejection.reason
            known[row] = False
            for _ in range(len(self.source)):
                broken = samples[row]
                self.bad_images.add(self.source.name(broken.index), reason)
                samples[row] = self._find(epoch, (broken.position + 1) % len(self.source))
                one, flips[row : row + 1], factors[row : row + 1] = self._decode(
                    epoch, samples[row : row + 1], known[row : row + 1]
                )
                if not one.rejected:
                    break
                reason = one.rejected[0].reason
            else:
                raise ValueError(_NOTHING_USABLE)
            resized.views[row], resized.token_views[row] = one.views[0], one.token_views[0]
            if resized.centers is not None and one.centers is not None:
                resized.centers[row] = one.centers[0]
        return _Resized(resized, flips, factors, tokens, known)

    def _decode(
        self, epoch: int, samples: list[_Sample], known: NDArray[np.bool_]
    ) -> tuple[ResizedViews, NDArray[np.bool_], NDArray[np.float32]]:
        headers = [sample.header for sample in samples]
        windows, flips, factors = self.views.sample(
            self.seed,
            self._view_epoch(epoch),
            [sample.index for sample in samples],
            [header.height for header in headers],
            [header.width for header in headers],
        )
        with self._one_at_a_time:
            return self._resizer.make([sample.data for sample in samples], headers, windows, known), flips, factors

    def _transform_on_cpu(
        self,
        views: Tensor,
        flips: NDArray[np.bool_],
        factors: NDArray[np.float32],
        centers: NDArray[np.float32],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Tensor:
        batch, height, width, _ = views.shape
        out = torch.empty(batch, 3, height, width)
        self._compiled.transform_views(
            views.numpy(), flips, factors, centers, mean, std, out.numpy(), threads=self.threads
        )
        return out

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.is_cuda else tensor.pin_memory().to(self.device, non_blocking=True)


def resolve_decoder(decoder: str, device: torch.device) -> str:
    """What `auto` stands for on this machine."""
    if decoder != "auto":
        return decoder
    return ("dali-gpu" if device.type == "cuda" else "dali") if has_dali() else "pil"


def _hand_over(batch: PretrainBatch, ready: torch.cuda.Event) -> None:
    """Let the consumer's stream wait for the batch, and keep its memory until that stream is done with it."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(ready)
    for tensor in (batch.images, batch.token_images, batch.mask, batch.sample_keys, batch.masked_indices):
        tensor.record_stream(stream)
    if batch.known_tokens is not None:
        batch.known_tokens.record_stream(stream)
