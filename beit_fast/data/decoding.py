"""Decoding windows of images: DALI where it is installed, Pillow otherwise or on request.

Both decoders give the same pixels on the CPU, those of docs/data.md: what one of them reads otherwise than meant goes
to the other (`Header.decoder`), what DALI fails on is tried with Pillow, and the EXIF rotation is applied here.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from beit_fast.data.screening import Header, Rejection, without_orientation

Crop = NDArray[np.uint8]
Windows = NDArray[np.int32]

DAMAGED = "cannot be decoded (damaged data)"
_FLIPS = ((False, False), (False, True), (True, True), (True, False))  # of rows and columns, by (orientation - 1) % 4


class Decoder(Protocol):
    def decode(self, encoded: Sequence[bytes], headers: Sequence[Header], windows: Windows) -> list[Crop | Rejection]:
        """Pixels of the windows (B, 4: top, left, height, width; after EXIF rotation): uint8 (height, width, 3) each.

        An image that cannot be decoded yields a Rejection; the others are unharmed. The pixels may lie in buffers of
        the decoder: they hold until its next call.
        """


class PilDecoder:
    """Pillow, one image after the other: the slow way for machines without DALI, and the yardstick in tests.

    Args:
        value_range: values of float and 32-bit pixels that become 0 and 255; None refuses such images.
    """

    def __init__(self, value_range: tuple[float, float] | None = None) -> None:
        if value_range is not None and not value_range[0] < value_range[1]:
            raise ValueError(f"value range: the first value must be below the second, got {value_range}")
        self.value_range = value_range
        self._dali: DaliDecoder | None = None

    def decode(self, encoded: Sequence[bytes], headers: Sequence[Header], windows: Windows) -> list[Crop | Rejection]:
        return [
            self._decode(data, header, window) for data, header, window in zip(encoded, headers, windows, strict=True)
        ]

    def _decode(self, data: bytes, header: Header, window: NDArray[np.int32]) -> Crop | Rejection:
        from PIL import Image

        if header.decoder == "dali":
            if not has_dali():
                return Rejection("16-bit colours need NVIDIA DALI: pip install 'beit-fast[train]'")
            self._dali = self._dali or DaliDecoder(1, self.value_range)
            pixels = self._dali.decode([data], [header], window[None])[0]
            return pixels if isinstance(pixels, Rejection) else np.array(pixels)
        if header.decoder == "array":
            return Rejection("an array; --data.channels N reads arrays of N channels")
        top, left, height, width = stored_window(window, header).tolist()
        try:
            image: Image.Image = Image.open(io.BytesIO(without_orientation(data) if header.format == "tiff" else data))
            gray = image.mode in ("I", "F") or image.mode.startswith("I;16")
            image = image.crop((left, top, left + width, top + height)) if gray else image.convert("RGB")
            if not gray:
                return oriented(np.array(image.crop((left, top, left + width, top + height))), header)
            values, is_wide = np.asarray(image), image.mode == "F" or (image.mode == "I" and header.format != "pnm")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            return Rejection(DAMAGED)
        low, high = (0, 65535) if not is_wide else self.value_range or (np.nan, np.nan)
        if np.isnan(low):
            kind = "float" if image.mode == "F" else "signed or 32-bit"
            return Rejection(
                f"{kind} pixels; --data.value-range LOW HIGH (predict, segment: --value-range) says which values are "
                "black and white"
            )
        levels = np.clip((values.astype(np.float64) - low) * (255 / (high - low)), 0, 255)
        gray8 = np.rint(np.nan_to_num(levels)).astype(np.uint8)
        return oriented(np.repeat(gray8[..., None], 3, axis=2), header)


def stored_window(window: NDArray[np.int32], header: Header) -> NDArray[np.int32]:
    """The window (4,) of an image as seen, in the image as stored: before the EXIF rotation."""
    if header.orientation == 1:
        return window
    top, left, height, width = window.tolist()
    flip_rows, flip_columns = _FLIPS[(header.orientation - 1) % 4]
    top = header.height - top - height if flip_rows else top
    left = header.width - left - width if flip_columns else left
    turned = (left, top, width, height) if header.orientation >= 5 else (top, left, height, width)
    return np.array(turned, np.int32)


def oriented(crop: Any, header: Header) -> Any:
    """The crop (h, w, 3), array or tensor, of an image as stored, turned as the image is seen."""
    if header.orientation == 1:
        return crop
    if header.orientation >= 5:
        crop = crop.swapaxes(0, 1)
    turned = [axis for axis, flip in enumerate(_FLIPS[(header.orientation - 1) % 4]) if flip]
    return crop.flip(turned) if hasattr(crop, "is_cuda") else np.flip(crop, tuple(turned))


def resolve_cpu_decoder(name: str) -> str:
    """Return what `auto` stands for on this machine."""
    return ("dali" if has_dali() else "pil") if name == "auto" else name


def open_decoder(name: str, threads: int, value_range: tuple[float, float] | None = None) -> Decoder:
    """Open the decoder "dali", "pil" or "auto" (DALI where it is installed), all on the CPU.

    Raises:
        ValueError: another name.
        ModuleNotFoundError: DALI is missing.
    """
    name = resolve_cpu_decoder(name)
    if name not in ("dali", "pil"):
        raise ValueError(f"decoder must be auto, dali or pil, got {name!r}")
    return DaliDecoder(threads, value_range) if name == "dali" else PilDecoder(value_range)


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

    output_type, dtype = "RGB", "UINT8"
    """DALI's names of the colours and the type of the pixels."""

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
        if self.device_id is None:
            return tuple(self._pipe.run())
        # in the order of that stream, in which DALI also takes the memory of outputs back: no thread waits
        return tuple(self._pipe.run(torch.cuda.current_stream(self.device_id)))

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
                output_type=getattr(types, self.output_type),
                dtype=getattr(types, self.dtype),
                adjust_orientation=False,  # it has a reading of its own of some EXIF data
                jpeg_fancy_upsampling=True,  # the GPU decoder then upsamples chroma as libjpeg-turbo does
            )
            pipe.set_outputs(*self.graph(crops))
        pipe.build()
        self._pipe = pipe


class DaliDecoder(DaliPipeline):
    """DALI's CPU decoder (libjpeg-turbo and others through nvImageCodec), several threads; Pillow where it fails."""

    def __init__(self, threads: int = 1, value_range: tuple[float, float] | None = None) -> None:
        super().__init__(threads, device_id=None)
        self._pillow = PilDecoder(value_range)

    def decode(self, encoded: Sequence[bytes], headers: Sequence[Header], windows: Windows) -> list[Crop | Rejection]:
        chosen = [number for number, header in enumerate(headers) if header.decoder in ("any", "dali")]
        pixels: dict[int, Crop | Rejection] = {}
        if chosen:
            stored = np.stack([stored_window(windows[number], headers[number]) for number in chosen])
            outputs, damaged = self.run_undamaged([encoded[number] for number in chosen], stored)
            whole = [number for row, number in enumerate(chosen) if row not in damaged]
            for number, crop in zip(whole, outputs[0] if outputs else (), strict=True):
                pixels[number] = oriented(np.asarray(crop), headers[number])
        for number, (data, header) in enumerate(zip(encoded, headers, strict=True)):
            if number not in pixels and header.decoder == "dali":
                pixels[number] = Rejection(DAMAGED)
            elif number not in pixels:
                pixels[number] = self._pillow.decode([data], [header], windows[[number]])[0]
        return [pixels[number] for number in range(len(encoded))]
