"""The two views of pre-training: the model's image and the tokenizer's, from one crop, with one mask.

A window of 8 to 100 % of the image is resized to `image_size` (bicubic) and to `token_image_size` (Lanczos), both with
the same colour jitter and flip; the first is normalised for the model, the second left in [0, 1] for the tokenizer
(paper, section 2.5 and appendix). Where the official transforms differ: docs/data.md.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from beit_fast.data.decoding import has_dali, resolve_cpu_decoder
from beit_fast.data.loader import Loader, Request
from beit_fast.data.reading import Sample
from beit_fast.data.resizing import CpuResizer, DaliResizer, Resizer, height_width
from beit_fast.data.sampling import BlockwiseMasking, CropSampler, sample_keys
from beit_fast.data.screening import BadImages, Rejection
from beit_fast.data.sources import ImageSource
from beit_fast.data.token_store import TokenStore


@dataclass(frozen=True)
class PretrainBatch:
    """One batch; on the device of its `PretrainLoader` except `indices` and `unknown`."""

    images: Tensor
    """float32 (b, C, H, W), normalised"""
    token_images: Tensor
    """float32 (b, C, h, w) in [0, 1]; with a token store only those of `unknown`, (u, C, h, w)"""
    mask: Tensor
    """bool (b, h, w), True where masked"""
    indices: Tensor
    """int64 (b,): samples of the source, replacements of bad images included"""
    sample_keys: Tensor
    """int64 (b,): for drop path"""
    masked_indices: Tensor
    """int64 (M,): `mask.flatten().nonzero()`, known beforehand: counting on a GPU would wait for it"""
    epoch: int
    known_tokens: Tensor | None = None
    """int64 (b, h, w) from the token store, where there is one; nothing of use at `unknown`"""
    unknown: Tensor | None = None
    """int64 (u,), on the CPU: rows of the batch whose tokens are not in the store yet"""
    visual_tokens: Tensor | None = None
    """int64 (M,) at `masked_indices`, or (b, h, w): what is to be predicted, once the tokenizer has seen the batch"""

    def __len__(self) -> int:
        return len(self.images)


class PretrainLoader(Loader):
    """Makes pre-training batches from a source of encoded images.

    An image that cannot be read or decoded is replaced by the sample at the next position of the epoch's order,
    (position + 1) modulo the length and so on, and reported to `bad_images`.

    Args:
        source: the images.
        masking: draws the masks; its grid divides both sizes.
        sampler: draws windows, flips and colours.
        seed: of everything that is random, together with epoch and sample.
        image_size: side of the model's view in pixels, or (height, width).
        token_image_size: likewise of the tokenizer's view. None: it sees the model's view (bicubic), not normalised.
        mean, std: normalise the model's view.
        device: "cuda" gives batches on the GPU.
        decoder: "dali" (CPU), "dali-gpu" (nvJPEG; the resize is DALI's too; unverified), "pil", or "auto" = "dali-gpu"
            on CUDA, "dali" elsewhere, "pil" where DALI is missing.
        jitter_center: contrast is about the mean gray of the view, or of the whole image, which then is all decoded.
        bad_images, threads, prefetch: see `Loader`.
        view_cycle: repeat windows, flips and colours every so many epochs; order, masks and drop path are those of the
            epoch.
        token_store: brings the tokens of views it knows (its cycle is `view_cycle`); tokenizer views are made of the
            others.
        value_range, channels: see `Loader`; with `channels` everything is decoded and resized on the CPU.

    Raises:
        ValueError: arguments do not fit together.
        ModuleNotFoundError: `beit_fast._C` or DALI is missing.
    """

    def __init__(
        self, source: ImageSource, masking: BlockwiseMasking, sampler: CropSampler, *,
        seed: int, image_size: int | tuple[int, int] = 224, token_image_size: int | tuple[int, int] | None = 112,
        mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.5, 0.5, 0.5),
        device: str | torch.device = "cpu", decoder: Literal["auto", "dali", "dali-gpu", "pil"] = "auto",
        jitter_center: Literal["view", "image"] = "view", bad_images: BadImages | None = None,
        threads: int | None = None, prefetch: int = 2,
        view_cycle: int | None = None, token_store: TokenStore | None = None,
        value_range: tuple[float, float] | None = None, channels: int | None = None,
    ) -> None:  # fmt: skip
        self.one_view = token_image_size is None
        token_size = masking.grid if token_image_size is None else token_image_size  # of one view: made of nothing
        for name, size in (("image_size", image_size), ("token_image_size", token_size)):
            sides = height_width(size)
            if min(sides) < 1 or any(side % patches for side, patches in zip(sides, masking.grid, strict=True)):
                raise ValueError(f"{name} {size} is not a multiple of the mask's grid {masking.grid}")
        if view_cycle is not None and view_cycle < 1:
            raise ValueError(f"view_cycle must be at least 1, got {view_cycle}")
        if token_store is not None and (
            token_store.cycle != view_cycle or token_store.num_tokens != masking.grid[0] * masking.grid[1]
        ):
            raise ValueError(
                f"token_store holds {token_store.num_tokens} tokens per view in a cycle of {token_store.cycle}; the "
                f"grid is {masking.grid} and view_cycle {view_cycle}"
            )
        super().__init__(
            source, seed=seed, device=device, bad_images=bad_images, threads=threads, prefetch=prefetch,
            channels=channels, value_range=value_range,
        )  # fmt: skip
        self.masking, self.sampler, self.mean, self.std = masking, sampler, tuple(mean), tuple(std)
        self.view_cycle, self.token_store = view_cycle, token_store
        if jitter_center not in ("view", "image"):
            raise ValueError(f"jitter_center must be view or image, got {jitter_center!r}")
        self.decoder = resolve_decoder(decoder, self.device)
        if channels is not None:
            self.decoder = resolve_cpu_decoder("auto" if self.decoder == "dali-gpu" else self.decoder)
        if self.decoder == "dali-gpu" and (self.device.type != "cuda" or jitter_center == "image"):
            raise ValueError(
                f"decoder dali-gpu needs device cuda and jitter_center view, got {self.device} and {jitter_center}"
            )
        on_cpu = self.open_decoder("pil" if self.decoder == "dali-gpu" else self.decoder)
        whole = jitter_center == "image"
        self._resizer: Resizer
        self._resizer = CpuResizer(on_cpu, self.workers, image_size, token_size, whole, channels)
        if self.decoder == "dali-gpu":
            self._resizer = DaliResizer(self.device, self.threads, self._resizer)
        self._lock = threading.Lock()  # a decoder has one set of buffers

    def batches(self, requests: Iterable[Request]) -> Iterator[PretrainBatch]:
        """Yield one batch per request, in order. `requests` is read ahead, by another thread."""
        return self.ahead(self._make(request.epoch, samples) for request, samples in self.read_ahead(requests))

    def _make(self, epoch: int, samples: list[Sample]) -> PretrainBatch:
        tokens, known = None, np.zeros(len(samples), np.bool_)
        if self.token_store is not None:
            tokens, known = self.token_store.read(epoch, np.array([sample.index for sample in samples], np.int64))
        skipped = np.ones_like(known) if self.one_view else known
        views = self._resizer.empty(len(samples))
        flips, factors = np.empty(len(samples), np.bool_), np.empty((len(samples), 3), np.float32)

        def resize_rows(rows: list[int]) -> dict[int, Rejection]:
            chosen = [samples[row] for row in rows]
            windows, flips[rows], factors[rows] = self.draw(self.sampler, self._view_epoch(epoch), chosen)
            with self._lock:
                failed = self._resizer.resize_into(views, rows, chosen, windows, skipped)
            known[list(failed)] = False
            return failed

        indices = self.make_all(epoch, samples, resize_rows)
        mask = self.masking.sample(self.seed, epoch, indices)
        masked_indices = torch.from_numpy(np.flatnonzero(mask.numpy()))
        unknown = torch.from_numpy(np.flatnonzero(~known))
        rows = self.send(unknown)
        resized, flip, factor = (self.send(x) for x in (views.images, *map(torch.from_numpy, (flips, factors))))
        if self.one_view:
            token_images = resized if tokens is None else resized.index_select(0, rows)
        else:
            chosen = rows if views.token_images.is_cuda else unknown
            token_images = self.send(views.token_images.index_select(0, chosen))  # `[chosen]` goes byte by byte
        # Both views share the centre of the contrast: they are one picture in two sizes.
        center = self.gray_means(resized) if views.centers is None else self.send(views.centers)
        images = self.transform(resized, flip, factor, center, self.mean, self.std)
        zeros, ones = (0,) * images.shape[1], (1,) * images.shape[1]
        token_images = self.transform(token_images, flip[rows], factor[rows], center[rows], zeros, ones)
        batch = PretrainBatch(
            images, token_images, self.send(mask), torch.from_numpy(indices),
            self.send(sample_keys(self.seed, epoch, indices)), self.send(masked_indices), epoch,
        )  # fmt: skip
        if tokens is None:
            return batch
        known_tokens = torch.from_numpy(tokens.astype(np.int64)).view(len(samples), *self.masking.grid)
        return replace(batch, known_tokens=self.send(known_tokens), unknown=unknown)

    def _view_epoch(self, epoch: int) -> int:
        return epoch if self.view_cycle is None else epoch % self.view_cycle


def resolve_decoder(decoder: str, device: torch.device) -> str:
    """Return what `auto` stands for on this machine.

    Raises:
        ValueError: no such decoder.
    """
    if decoder not in ("auto", "dali", "dali-gpu", "pil"):
        raise ValueError(f"decoder must be auto, dali, dali-gpu or pil, got {decoder!r}")
    if decoder == "auto" and device.type == "cuda" and has_dali():
        return "dali-gpu"
    return resolve_cpu_decoder(decoder)
