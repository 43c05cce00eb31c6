"""From encoded images and crop windows to the two resized views, before colour: on the CPU and on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from beit_fast.data.arrays.decoding import ArrayDecoder
from beit_fast.data.augmentation.color_jitter import mean_gray
from beit_fast.data.decoding import DaliPipeline, Decoder, Windows, oriented, stored_window
from beit_fast.data.reading import Sample, decode
from beit_fast.data.screening import Rejection

Flags = NDArray[np.bool_]


class ResizedViews(NamedTuple):
    """Both views of a batch."""

    images: Tensor
    """uint8 (B, H, W, 3), or float32 (B, H, W, C) in [0, 1]; bicubic"""
    token_images: Tensor
    """uint8 (B, h, w, 3) or float32 (B, h, w, C), Lanczos; rows of images whose tokens are known hold nothing of use"""
    centers: Tensor | None
    """float32 (B,): mean gray of the whole image, where the resizer sees it"""


class Resizer(Protocol):
    """From encoded samples and windows to both views."""

    def empty(self, batch: int) -> ResizedViews:
        """Memory for the views of a batch, on the device of the resizer."""

    def resize_into(
        self, views: ResizedViews, rows: list[int], samples: Sequence[Sample], windows: Windows, known: Flags
    ) -> dict[int, Rejection]:
        """Fill `rows` of `views` with `samples` (len(rows)); returns the rows that could not be decoded.

        `known` (B,): rows that need no tokenizer view.
        """


@cache
def has_uint8_lanczos() -> bool:
    """Whether this torch resizes bytes with a Lanczos filter (2.13 does, on the CPU)."""
    try:
        functional.interpolate(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), size=(4, 4), mode="lanczos", antialias=True)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def height_width(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size: a side, or both."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def empty_views(count: int, size: tuple[int, int], channels: int | None) -> Tensor:
    """Memory for `count` views of `size` (H, W): uint8 (count, H, W, 3), or float32 where the channels are given."""
    kind = torch.uint8 if channels is None else torch.float32
    return torch.empty(count, *size, channels or 3, dtype=kind)


def resize(crop: Any, size: tuple[int, int], mode: str) -> Tensor:
    """Resize (h, w, C) to `size` (H, W): (H, W, C), antialiased; `mode` "bicubic", "bilinear" or "lanczos".

    Bytes of three channels come within a level of Pillow on average (tests), floats in [0, 1] of any number of channels
    within rounding. Where torch has no Lanczos, Pillow itself does it, three times slower.
    """
    if mode == "lanczos" and not has_uint8_lanczos():
        from PIL import Image

        if crop.dtype != np.uint8:
            planes = [
                np.array(Image.fromarray(plane).resize(size[::-1], Image.Resampling.LANCZOS))
                for plane in np.moveaxis(crop, 2, 0)
            ]
            return torch.from_numpy(np.stack(planes, 2)).clamp_(0, 1)
        return torch.from_numpy(np.array(Image.fromarray(crop).resize(size[::-1], Image.Resampling.LANCZOS)))
    if crop.dtype != np.uint8:
        planes_first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(crop, 2, 0)))[None]
        if tuple(crop.shape[:2]) != size:  # overshoots at edges are clipped, as of bytes
            planes_first = functional.interpolate(planes_first, size=size, mode=mode, antialias=True).clamp_(0, 1)
        return planes_first[0].permute(1, 2, 0)
    # The channels-last layout takes torch's vector code: seven times faster than planes.
    image = torch.from_numpy(np.require(crop, requirements=["C", "W"])).permute(2, 0, 1)[None]
    if tuple(crop.shape[:2]) != size:
        image = functional.interpolate(image, size=size, mode=mode, antialias=True)
    return image[0].permute(1, 2, 0)


class CpuResizer:
    """Decoder on the CPU, then torch's antialiased resize, one image per task of `pool`."""

    def __init__(
        self, decoder: Decoder | ArrayDecoder, pool: ThreadPoolExecutor, image_size: int | Sequence[int],
        token_image_size: int | Sequence[int], whole_image: bool, channels: int | None = None,
    ) -> None:  # fmt: skip
        self.decoder, self.pool, self.whole_image, self.channels = decoder, pool, whole_image, channels
        self.sizes = (height_width(image_size), height_width(token_image_size))

    def empty(self, batch: int) -> ResizedViews:
        images, token_images = (empty_views(batch, size, self.channels) for size in self.sizes)
        return ResizedViews(images, token_images, torch.zeros(batch) if self.whole_image else None)

    def resize_into(
        self, views: ResizedViews, rows: list[int], samples: Sequence[Sample], windows: Windows, known: Flags
    ) -> dict[int, Rejection]:
        decoded = windows
        if self.whole_image:
            decoded = np.array([(0, 0, sample.header.height, sample.header.width) for sample in samples], np.int32)
        crops = decode(self.decoder, samples, decoded)

        def work(row: int, crop: Any, window: list[int]) -> None:
            if isinstance(crop, Rejection):
                return
            if views.centers is not None:
                top, left, height, width = window
                views.centers[row] = float(mean_gray(np.ascontiguousarray(crop)[None])[0])
                crop = crop[top : top + height, left : left + width]
            size, token_size = self.sizes
            views.images[row] = resize(crop, size, "bicubic")
            if not known[row]:
                views.token_images[row] = resize(crop, token_size, "lanczos")

        list(self.pool.map(work, rows, crops, windows.tolist()))
        return {row: crop for row, crop in zip(rows, crops, strict=True) if isinstance(crop, Rejection)}


class DaliResizer(DaliPipeline):
    """DALI's decoder and resize: nvJPEG and kernels on a GPU, which is unverified; on a CPU the same graph (tests)."""

    def __init__(self, device: torch.device, threads: int, on_cpu: CpuResizer) -> None:
        current = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
        super().__init__(threads, device_id=current)
        self.device, self.sizes, self._on_cpu = device, on_cpu.sizes, on_cpu

    def graph(self, crops: Any) -> tuple[Any, ...]:
        return resize_with_dali(crops, *self.sizes)

    def empty(self, batch: int) -> ResizedViews:
        images, token_images = (
            torch.empty(batch, *size, 3, dtype=torch.uint8, device=self.device) for size in self.sizes
        )
        return ResizedViews(images, token_images, None)

    def resize_into(
        self, views: ResizedViews, rows: list[int], samples: Sequence[Sample], windows: Windows, known: Flags
    ) -> dict[int, Rejection]:
        """The graph makes both views of all samples, `known` or not; what it cannot decode is made on the CPU."""
        chosen = [index for index, sample in enumerate(samples) if sample.header.decoder in ("any", "dali")]
        stored = np.array([stored_window(windows[index], samples[index].header) for index in chosen], np.int32)
        outputs, damaged = self.run_undamaged([samples[index].data for index in chosen], stored) if chosen else ((), {})
        whole = [index for number, index in enumerate(chosen) if number not in damaged]
        if len(whole) == len(views.images):
            _copy_from_dali(outputs, views[:2])
        elif whole:
            parts = self.empty(len(whole))
            _copy_from_dali(outputs, parts[:2])
            _put(parts, views, [rows[index] for index in whole])
        for index in whole:
            header = samples[index].header
            for view in views[:2] if header.orientation != 1 else ():
                view[rows[index]] = oriented(view[rows[index]].clone(), header)
        rest = sorted(set(range(len(rows))) - set(whole))
        if not rest:
            return {}
        # In memory first: the threads of the CPU's resizer know nothing of the stream of this one.
        targets, parts = [rows[index] for index in rest], self._on_cpu.empty(len(rest))
        failed = self._on_cpu.resize_into(
            parts, list(range(len(rest))), [samples[index] for index in rest], windows[rest], known[targets]
        )
        _put(parts, views, targets)
        return {targets[number]: rejection for number, rejection in failed.items()}


def _put(parts: ResizedViews, views: ResizedViews, rows: list[int]) -> None:
    """Copy both views of some samples to `rows` of a batch."""
    for part, view in zip(parts[:2], views[:2], strict=True):
        view[torch.tensor(rows).to(view.device)] = part.to(view.device)


def resize_with_dali(
    crops: Any, image_size: int | Sequence[int], token_image_size: int | Sequence[int]
) -> tuple[Any, Any]:
    """The two resizes as a DALI graph; without antialiasing the small view would be off by 2 to 4 levels on average."""
    from nvidia.dali import fn, types

    return (
        fn.resize(crops, size=height_width(image_size), interp_type=types.INTERP_CUBIC, antialias=True),
        fn.resize(crops, size=height_width(token_image_size), interp_type=types.INTERP_LANCZOS3, antialias=True),
    )


def _copy_from_dali(outputs: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    from nvidia.dali.plugin.pytorch import feed_ndarray

    stream = torch.cuda.current_stream(tensors[0].device) if tensors[0].is_cuda else None
    for output, tensor in zip(outputs, tensors, strict=True):
        feed_ndarray(output.as_tensor(), tensor, cuda_stream=stream)  # with a stream it does not wait
