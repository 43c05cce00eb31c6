"""Decoding windows of images: DALI where it is installed, Pillow otherwise or on request.

Both decoders give the same pixels on the CPU (JPEG bit for bit; transparency is dropped, gray becomes RGB, EXIF
rotation is applied). Only the window is kept, and DALI decodes little more than that of it.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from beit_fast.data.screening import Rejection

Crop = NDArray[np.uint8]
Windows = NDArray[np.int32]

DAMAGED = "cannot be decoded (damaged data)"


class Decoder(Protocol):
    def decode(self, encoded: Sequence[bytes], windows: Windows) -> list[Crop | Rejection]:
        """Pixels of the windows (B, 4: top, left, height, width; after EXIF rotation): uint8 (height, width, 3) each.

        An image that cannot be decoded yields a Rejection; the others are unharmed. The pixels may lie in buffers of
        the decoder: they hold until its next call.
        """


class PilDecoder:
    """Pillow, one image after the other: the slow way for machines without DALI, and the yardstick in tests."""

    def decode(self, encoded: Sequence[bytes], windows: Windows) -> list[Crop | Rejection]:
        return [self._decode(data, *window) for data, window in zip(encoded, windows.tolist(), strict=True)]

    def _decode(self, data: bytes, top: int, left: int, height: int, width: int) -> Crop | Rejection:
        from PIL import Image, ImageOps

        try:
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.mode.startswith("I;16"):  # convert("RGB") would clip instead of scaling
                gray = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
                exif = image.getexif()
                image = Image.fromarray(gray.astype(np.uint8))
                image.getexif().update(exif)
            image = ImageOps.exif_transpose(image).convert("RGB")
            return np.array(image.crop((left, top, left + width, top + height)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return Rejection(DAMAGED)


def resolve_cpu_decoder(name: str) -> str:
    """Return what `auto` stands for on this machine."""
    return ("dali" if has_dali() else "pil") if name == "auto" else name


def open_decoder(name: str, threads: int) -> Decoder:
    """Open the decoder "dali", "pil" or "auto" (DALI where it is installed), all on the CPU.

    Raises:
        ValueError: another name.
        ModuleNotFoundError: DALI is missing.
    """
    name = resolve_cpu_decoder(name)
    if name not in ("dali", "pil"):
        raise ValueError(f"decoder must be auto, dali or pil, got {name!r}")
    return DaliDecoder(threads) if name == "dali" else PilDecoder()


def require_dali() -> Any:
    """The module `nvidia.dali`; ModuleNotFoundError with the way out where it is missing."""
    try:
        import nvidia.dali as dali
    except ImportError as error:
        raise ModuleNotFoundError(
            f"NVIDIA DALI cannot be imported ({error}); pip install 'beit-fast[train]'"
        ) from error
    return dali


def has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


class DaliPipeline:
    """A DALI graph fed with encoded bytes and windows; built when first used, and again after an error.

    `device_id=None` needs no GPU. Subclasses say what comes after the decoder. Not thread-safe.
    """

    def __init__(self, threads: int, device_id: int | None) -> None:
        require_dali()
        self.threads = threads
        self.device_id = device_id
        self._pipe: Any = None
        self._capacity = 0

    def graph(self, crops: Any) -> tuple[Any, ...]:
        return (crops,)

    def run(self, encoded: Sequence[bytes], windows: Windows) -> tuple[Any, ...]:
        """Outputs of the graph for this batch; RuntimeError (and no usable pipeline) where one image is damaged."""
        if self._pipe is None or len(encoded) > self._capacity:
            self._build(len(encoded))
        self._pipe.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        self._pipe.feed_input("start", list(windows[:, :2]))
        self._pipe.feed_input("shape", list(windows[:, 2:]))
        return tuple(self._pipe.run())

    def run_undamaged(self, encoded: Sequence[bytes], windows: Windows) -> tuple[tuple[Any, ...], set[int]]:
        """Outputs for the images that can be decoded (none where there is none), and which cannot."""
        try:
            return self.run(encoded, windows), set()
        except RuntimeError:
            self._pipe = None  # nothing is promised of a pipeline after an error
        damaged = {number for number in range(len(encoded)) if not self._decodes(encoded[number], windows[[number]])}
        kept = [number for number in range(len(encoded)) if number not in damaged]
        return (self.run([encoded[number] for number in kept], windows[kept]) if kept else ()), damaged

    def _decodes(self, data: bytes, window: Windows) -> bool:
        try:
            self.run([data], window)
        except RuntimeError:
            self._pipe = None
            return False
        return True

    def _build(self, capacity: int) -> None:
        from nvidia.dali import Pipeline, fn, types

        self._pipe = None
        self._capacity = max(capacity, self._capacity)
        mixed = self.device_id is not None
        pipe = Pipeline(
            batch_size=self._capacity,
            num_threads=self.threads,
            device_id=self.device_id,
            # One batch at a time: the caller already works ahead of the model in its own thread.
            prefetch_queue_depth=1,
        )
        with pipe:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
            shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
            crops = fn.decoders.image_slice(
                encoded,
                start=start,
                shape=shape,
                axes=(0, 1),
                device="mixed" if mixed else "cpu",
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,  # the GPU decoder then upsamples chroma as libjpeg-turbo does
            )
            pipe.set_outputs(*self.graph(crops))
        pipe.build()
        self._pipe = pipe


class DaliDecoder(DaliPipeline):
    """DALI's CPU decoder (libjpeg-turbo and others through nvImageCodec), several threads."""

    def __init__(self, threads: int = 1) -> None:
        super().__init__(threads, device_id=None)

    def decode(self, encoded: Sequence[bytes], windows: Windows) -> list[Crop | Rejection]:
        outputs, damaged = self.run_undamaged(encoded, windows)
        crops = iter(outputs[0] if outputs else ())
        return [Rejection(DAMAGED) if number in damaged else np.asarray(next(crops)) for number in range(len(encoded))]
