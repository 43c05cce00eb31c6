"""What the header of an array or a TIFF says of its pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class NpyLayout(NamedTuple):
    """Where the pixels of a `.npy` file lie, and what they are."""

    height: int
    width: int
    channels: int
    dtype: np.dtype[Any]
    order: str
    """Of the axes in memory, "C" or "F"."""
    offset: int
    """Of the first pixel in the file."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def npy_layout(data: bytes) -> NpyLayout:
    """Read the header of a `.npy` file; of three axes the last one counts channels.

    Raises:
        ValueError: it is no array of pixels.
    """
    file = io.BytesIO(data)
    major, _ = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    if len(shape) not in (2, 3) or dtype.kind not in "uif" or min(shape) < 1:
        raise ValueError(f"array of shape {shape} and type {dtype}; images are numbers (H, W) or (H, W, C)")
    height, width, channels = (*shape, 1)[:3]
    order = "F" if is_fortran else "C"
    return NpyLayout(height, width, channels, dtype, order, file.tell(), tuple(shape))


def read_npy(data: bytes) -> np.ndarray:
    """The pixels (H, W, C) of a `.npy` file that the screening took."""
    layout = npy_layout(data)
    flat = np.frombuffer(data, layout.dtype, layout.nbytes // layout.dtype.itemsize, layout.offset)
    array = flat.reshape(layout.shape, order="F" if layout.order == "F" else "C")
    return array if array.ndim == 3 else array[:, :, None]


def tiff_depth(tags: Mapping[int, tuple[int, ...]]) -> str:
    """The type of the pixels of a TIFF by its tags; bits below 8 are unpacked to bytes."""
    bits, kinds = set(tags.get(258, (1,))), set(tags.get(339, (1,)))
    if len(bits) != 1 or len(kinds) != 1:
        return "mixed types"
    size, kind = max(8, bits.pop()), {1: "uint", 2: "int", 3: "float"}.get(kinds.pop(), "unknown")
    return f"{kind}{size}"
