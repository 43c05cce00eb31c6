"""Decoding windows of images as float arrays, with the channels and the depth that they have.

DALI decodes 8-bit images of one or three channels and 16-bit PNG; TIFF of more than 8 bits or of other channels, and
arrays, are read here; Pillow has the rest. All of it on the CPU.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit_fast.data.arrays.layout import read_npy
from beit_fast.data.arrays.tiff import UnsupportedTiff, read_tiff
from beit_fast.data.decoding import DAMAGED, DaliPipeline, Windows, oriented, resolve_cpu_decoder, stored_window
from beit_fast.data.screening import Header, Rejection, without_orientation

FloatCrop = NDArray[np.float32]
_FULL_SCALE = {"uint8": 255.0, "uint16": 65535.0}


class ArrayDecoder:
    """Windows of images as float32 (height, width, C) in [0, 1].

    Args:
        decoder: "auto", "dali" or "pil", as everywhere; the pixels are the same.
        threads: of DALI.
        value_range: values that become 0 and 1, what lies beyond is clipped; None: 0 and the largest of the type.
        scaled: False gives the values as they are stored, as floats.

    Raises:
        ValueError: the range is empty, or there is no such decoder.
    """

    def __init__(
        self, decoder: str = "auto", threads: int = 1, value_range: tuple[float, float] | None = None,
        scaled: bool = True,
    ) -> None:  # fmt: skip
        if value_range is not None and not value_range[0] < value_range[1]:
            raise ValueError(f"value range: the first value must be below the second, got {value_range}")
        self.name = resolve_cpu_decoder("auto" if decoder == "dali-gpu" else decoder)
        if self.name not in ("dali", "pil"):
            raise ValueError(f"decoder must be auto, dali or pil, got {decoder!r}")
        self.threads, self.value_range, self.scaled = threads, value_range, scaled
        self._pipelines: dict[tuple[str, str], DaliPipeline] = {}

    def decode(
        self, encoded: Sequence[bytes], headers: Sequence[Header], windows: Windows
    ) -> list[FloatCrop | Rejection]:
        """As `decoding.Decoder.decode`, in floats."""
        crops: dict[int, FloatCrop | Rejection] = {}
        groups: dict[tuple[str, str], list[int]] = {}
        for number, header in enumerate(headers):
            if (output := self._dali_output(header)) is not None:
                groups.setdefault(output, []).append(number)
        for output, chosen in groups.items():
            stored = np.stack([stored_window(windows[number], headers[number]) for number in chosen])
            outputs, damaged = self._pipeline(output).run_undamaged([encoded[number] for number in chosen], stored)
            whole = [number for row, number in enumerate(chosen) if row not in damaged]
            for number, crop in zip(whole, outputs[0] if outputs else (), strict=True):
                crops[number] = self._finished(np.asarray(crop), headers[number])
        for number, (data, header) in enumerate(zip(encoded, headers, strict=True)):
            if number not in crops:
                crops[number] = self._decode_here(data, header, stored_window(windows[number], header))
        return [crops[number] for number in range(len(encoded))]

    def _dali_output(self, header: Header) -> tuple[str, str] | None:
        """The colours and the type that DALI is asked for; None where it is not asked."""
        if header.format == "png" and header.depth == "uint16" and header.channels != 2:
            return ("ANY_DATA", "UINT16") if self.name == "dali" or header.channels > 1 else None
        if self.name == "dali" and header.depth == "uint8" and header.decoder == "any" and header.format != "tiff":
            return {1: ("GRAY", "UINT8"), 3: ("RGB", "UINT8")}.get(header.channels)
        return None

    def _pipeline(self, output: tuple[str, str]) -> DaliPipeline:
        if output not in self._pipelines:
            pipeline = DaliPipeline(self.threads, device_id=None)
            pipeline.output_type, pipeline.dtype = output
            self._pipelines[output] = pipeline
        return self._pipelines[output]

    def _decode_here(self, data: bytes, header: Header, window: NDArray[np.int32]) -> FloatCrop | Rejection:
        if header.format == "png" and header.depth == "uint16" and header.channels == 2:
            return Rejection("16-bit grey PNG with transparency; save it as TIFF or .npy")
        try:
            pixels = self._pixels(data, header)
        except UnsupportedTiff as error:
            return Rejection(str(error))
        except (OSError, ValueError, SyntaxError):
            return Rejection(DAMAGED)
        if pixels.shape[2] != header.channels:
            return Rejection(f"{pixels.shape[2]} channels, its header says {header.channels}")
        top, left, height, width = window.tolist()
        return self._finished(pixels[top : top + height, left : left + width], header)

    def _pixels(self, data: bytes, header: Header) -> NDArray[Any]:
        """The whole image as stored, (H, W, C)."""
        if header.format == "npy":
            return read_npy(data)
        is_tiff = header.format == "tiff"
        if is_tiff and (header.depth != "uint8" or header.channels not in (1, 3)):
            try:
                return read_tiff(data)
            except UnsupportedTiff:
                if header.channels > 1:  # of one channel Pillow knows more kinds
                    raise
        return _with_pillow(without_orientation(data) if is_tiff else data, header)

    def _finished(self, pixels: NDArray[Any], header: Header) -> FloatCrop:
        if not self.scaled:
            return np.ascontiguousarray(oriented(pixels.astype(np.float32), header))
        low, high = self.value_range or (0.0, _FULL_SCALE.get(pixels.dtype.name, np.nan))
        values = (pixels.astype(np.float32) - np.float32(low)) * np.float32(1 / (high - low))
        return np.ascontiguousarray(oriented(np.clip(np.nan_to_num(values), 0, 1), header))


def _with_pillow(data: bytes, header: Header) -> NDArray[Any]:
    from PIL import Image

    image: Image.Image = Image.open(io.BytesIO(data))
    if header.depth == "uint8":
        image = image.convert({1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[header.channels])
    pixels = np.asarray(image)
    if pixels.dtype.name != header.depth:  # Pillow widens some types: the values are the same
        if header.channels > 1 or not np.array_equal(pixels, pixels.astype(header.depth)):
            raise ValueError("damaged: its header names another type")
        pixels = pixels.astype(header.depth)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]
