"""The pixels of a TIFF of any number of channels and any depth, stored or deflated (TIFF 6.0; technical note 3).

Pillow knows one channel of more than 8 bits, DALI three; microscopes and satellites have others.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STORED, _DEFLATED = 1, (8, 32946)
_NAMES = {2: "CCITT", 3: "CCITT", 4: "CCITT", 5: "LZW", 6: "JPEG", 7: "JPEG", 32773: "PackBits", 34925: "LZMA",
          34887: "LERC", 50000: "Zstandard", 50001: "WebP"}  # fmt: skip
_INTEGERS = {1: "B", 3: "H", 4: "I"}


class UnsupportedTiff(ValueError):
    """A TIFF that this reader does not know; the message says what and the way out."""


def read_tiff(data: bytes) -> NDArray[Any]:
    """The pixels (H, W, C) of the first page, in the file's type, before its orientation is applied.

    Raises:
        UnsupportedTiff: another compression, or bits that fill no type.
        OSError: its data are damaged.
    """
    order = "<" if data.startswith(b"II") else ">"
    try:
        return _pixels(data, order, _tags(data, order))
    except (struct.error, zlib.error, ValueError, IndexError) as error:
        if isinstance(error, UnsupportedTiff):
            raise
        raise OSError(f"cannot be decoded (damaged data: {error})") from None


def _tags(data: bytes, order: str) -> dict[int, tuple[int, ...]]:
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    tags = {}
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, entry)
        if kind in _INTEGERS and number <= 10_000_000:
            layout = f"{order}{number}{_INTEGERS[kind]}"
            small = struct.calcsize(layout) <= 4
            offset = entry + 8 if small else struct.unpack_from(order + "I", data, entry + 8)[0]
            tags[tag] = struct.unpack_from(layout, data, offset)
    return tags


def _pixels(data: bytes, order: str, tags: dict[int, tuple[int, ...]]) -> NDArray[Any]:
    height, width, samples = tags[257][0], tags[256][0], tags.get(277, (1,))[0]
    bits, kind = tags.get(258, (1,))[0], tags.get(339, (1,))[0]
    packing, predictor, planar = tags.get(259, (1,))[0], tags.get(317, (1,))[0], tags.get(284, (1,))[0] == 2
    if packing != _STORED and packing not in _DEFLATED:
        name = _NAMES.get(packing, f"method {packing}")
        raise UnsupportedTiff(f"TIFF of {samples} x {bits} bits packed by {name}; save it unpacked or deflated")
    if bits not in (8, 16, 32, 64) or kind not in (1, 2, 3) or (kind == 3 and bits == 8) or predictor not in (1, 2, 3):
        raise UnsupportedTiff(f"TIFF of {bits} bits, sample format {kind}, predictor {predictor}; save it as .npy")
    dtype = np.dtype(f"{order}{'?uif'[kind]}{bits // 8}")
    tiled = 322 in tags
    rows, columns = (tags[323][0], tags[322][0]) if tiled else (min(tags.get(278, (height,))[0], height), width)
    starts, lengths = (tags[324], tags[325]) if tiled else (tags[273], tags[279])
    down, across = -(-height // rows), -(-width // columns)
    depth = 1 if planar else samples
    result = np.zeros((height, width, samples), dtype.newbyteorder("="))
    if len(starts) != down * across * (samples if planar else 1) or len(lengths) != len(starts):
        raise ValueError(f"damaged: {len(starts)} parts")
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        plane, place = divmod(number, down * across)
        top, left = place // across * rows, place % across * columns
        count = rows if tiled else min(rows, height - top)
        part = data[start : start + length]
        size = count * columns * depth * dtype.itemsize
        if packing != _STORED:
            part = zlib.decompressobj().decompress(part, size)
        if len(part) < size:
            raise ValueError("damaged: a part is too short")
        block = _unpredicted(part[:size], dtype, (count, columns, depth), predictor)
        target = result[top : top + rows, left : left + columns, plane : plane + 1] if planar else (
            result[top : top + rows, left : left + columns]
        )  # fmt: skip
        target[:] = block[: target.shape[0], : target.shape[1]]
    if tags.get(262, (1,))[0] == 0 and kind == 1:  # 0 is white
        result = np.iinfo(result.dtype).max - result
    return result


def _unpredicted(part: bytes, dtype: np.dtype[Any], shape: tuple[int, int, int], predictor: int) -> NDArray[Any]:
    """Pixels (rows, columns, samples) of a strip or tile: differences along rows are added up."""
    if predictor == 3:  # bytes of a row by significance, highest first, as differences
        rows, columns, samples = shape
        planes = np.frombuffer(part, np.uint8).reshape(rows, dtype.itemsize * columns, samples)
        planes = np.cumsum(planes, axis=1, dtype=np.uint8).reshape(rows, dtype.itemsize, columns * samples)
        return np.ascontiguousarray(planes.swapaxes(1, 2)).view(dtype.newbyteorder(">")).reshape(shape)
    block = np.frombuffer(part, dtype).reshape(shape)
    if predictor == 2:
        return np.cumsum(block, axis=1, dtype=dtype.newbyteorder("="))
    return block
