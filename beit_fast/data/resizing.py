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

from beit_fast.data.decoding import DAMAGED, Crop, DaliPipeline, Decoder, Windows
from beit_fast.data.sampling import compiled_module
from beit_fast.data.screening import Header, Rejection


class ResizedViews(NamedTuple):
    """Both views of a batch; rows of rejected images hold nothing of use."""

    views: Tensor
    """uint8 (B, S, S, 3), bicubic"""
    token_views: Tensor
    """uint8 (B, s, s, 3), Lanczos; rows of images whose tokens are known hold nothing of use"""
    centers: Tensor | None
    """float32 (B,): mean gray of the whole image, where that was asked for"""
    rejected: dict[int, Rejection]


class Resizer(Protocol):
    def make(
        self, encoded: Sequence[bytes], headers: Sequence[Header], windows: Windows, known: NDArray[np.bool_]
    ) -> ResizedViews:
        """`known` (B,): images that need no tokenizer view."""


@cache
def has_uint8_lanczos() -> bool:
    """Whether this torch resizes bytes with a Lanczos filter (2.13 does, on the CPU)."""
    try:
        functional.interpolate(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), size=(4, 4), mode="lanczos", antialias=True)
    except (NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def resize(crop: Crop, size: int, mode: str, out: Tensor) -> None:
    """Resize uint8 (h, w, 3) into `out` (size, size, 3), antialiased; `mode` is "bicubic" or "lanczos".

    Within a level of Pillow on average (tests). Where torch has no Lanczos for bytes, Pillow itself does it, three
    times slower.
    """
    if mode == "lanczos" and not has_uint8_lanczos():
        from PIL import Image

        resized = Image.fromarray(crop).resize((size, size), Image.Resampling.LANCZOS)
        out.copy_(torch.from_numpy(np.array(resized)))
        return
    # The channels-last layout takes torch's vector code: seven times faster than planes.
    image = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1)[None]
    out.copy_(functional.interpolate(image, size=(size, size), mode=mode, antialias=True)[0].permute(1, 2, 0))


class CpuResizer:
    """Decoder on the CPU, then torch's antialiased resize, one image per task of `pool`."""

    def __init__(
        self, decoder: Decoder, pool: ThreadPoolExecutor, image_size: int, token_image_size: int, whole_image: bool
    ) -> None:
        self.decoder, self.pool = decoder, pool
        self.image_size, self.token_image_size = image_size, token_image_size
        self.whole_image = whole_image

    def make(
        self, encoded: Sequence[bytes], headers: Sequence[Header], windows: Windows, known: NDArray[np.bool_]
    ) -> ResizedViews:
        batch = len(encoded)
        views = torch.empty(batch, self.image_size, self.image_size, 3, dtype=torch.uint8)
        token_views = torch.empty(batch, self.token_image_size, self.token_image_size, 3, dtype=torch.uint8)
        centers = torch.zeros(batch) if self.whole_image else None
        decoded_windows = windows
        if self.whole_image:
            decoded_windows = np.array([(0, 0, header.height, header.width) for header in headers], np.int32)
        crops = self.decoder.decode(encoded, decoded_windows)

        def work(number: int) -> None:
            crop = crops[number]
            if isinstance(crop, Rejection):
                return
            if centers is not None:
                top, left, height, width = windows[number]
                centers[number] = float(compiled_module().gray_means(np.ascontiguousarray(crop)[None])[0])
                crop = crop[top : top + height, left : left + width]
            resize(crop, self.image_size, "bicubic", views[number])
            if not known[number]:
                resize(crop, self.token_image_size, "lanczos", token_views[number])

        for _ in self.pool.map(work, range(batch)):
            pass
        rejected = {number: crop for number, crop in enumerate(crops) if isinstance(crop, Rejection)}
        return ResizedViews(views, token_views, centers, rejected)


class GpuResizer(DaliPipeline):
    """nvJPEG and DALI's resize on the GPU. Written without a GPU at hand: unverified."""

    def __init__(self, device: torch.device, threads: int, image_size: int, token_image_size: int) -> None:
        self.device = device
        index = device.index if device.index is not None else torch.cuda.current_device()
        super().__init__(threads, device_id=index)
        self.image_size, self.token_image_size = image_size, token_image_size

    def graph(self, crops: Any) -> tuple[Any, ...]:
        return resize_with_dali(crops, self.image_size, self.token_image_size)

    def make(
        self, encoded: Sequence[bytes], headers: Sequence[Header], windows: Windows, known: NDArray[np.bool_]
    ) -> ResizedViews:
        """The graph makes both views of all images, `known` or not."""
        batch = len(encoded)
        views = torch.empty(batch, self.image_size, self.image_size, 3, dtype=torch.uint8, device=self.device)
        size = self.token_image_size
        token_views = torch.empty(batch, size, size, 3, dtype=torch.uint8, device=self.device)
        rejected: dict[int, Rejection] = {}
        try:
            outputs = self.run(encoded, windows)
        except RuntimeError:
            self.drop()
            rejected = {number: Rejection(DAMAGED) for number in self.damaged(encoded, windows)}
            kept = [number for number in range(batch) if number not in rejected]
            if kept:
                parts = [torch.empty_like(views[: len(kept)]), torch.empty_like(token_views[: len(kept)])]
                _copy_from_dali(self.run([encoded[number] for number in kept], windows[kept]), parts)
                views[kept], token_views[kept] = parts
        else:
            _copy_from_dali(outputs, [views, token_views])
        return ResizedViews(views, token_views, None, rejected)


def resize_with_dali(crops: Any, image_size: int, token_image_size: int) -> tuple[Any, Any]:
    """The two resizes as a DALI graph; without antialiasing the small view would be off by 2 to 4 levels on average."""
    from nvidia.dali import fn, types

    return (
        fn.resize(crops, size=[image_size, image_size], interp_type=types.INTERP_CUBIC, antialias=True),
        fn.resize(crops, size=[token_image_size] * 2, interp_type=types.INTERP_LANCZOS3, antialias=True),
    )


def _copy_from_dali(outputs: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    from nvidia.dali.plugin.pytorch import feed_ndarray

    stream = torch.cuda.current_stream(tensors[0].device)
    for output, tensor in zip(outputs, tensors, strict=True):
        feed_ndarray(output.as_tensor(), tensor, cuda_stream=stream)
    stream.synchronize()  # the next run of the pipeline writes into the same buffers
