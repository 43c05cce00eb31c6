"""A look at the header and the end of an encoded image, before a decoder meets it.

DALI loses a whole batch to one broken file and often does not say which one it was. The rules below refuse the kinds of
file on which it fails (empty, cut off, another format, unsupported coding), and give the height and width that the
crop window is drawn from, without decoding a pixel. Damage inside an intact file shows only in decoding.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import threading
from dataclasses import dataclass
from typing import Literal

from beit_fast.data.arrays.layout import npy_layout, tiff_depth

logger = logging.getLogger("beit_fast.data")

MAX_PIXELS = 64_000_000
"""Larger images are refused: at three bytes a pixel, one in a batch of hundreds is a memory fault."""
_TAIL = 4096  # most images end there; only where they do not, the end is looked for in all of the data
_JPEG_MARKER = re.compile(rb"\xff+[^\x00\x01\xd0-\xd7\xff]")  # not the escapes and restarts within a scan


Route = Literal["any", "dali", "pillow", "array"]


@dataclass(frozen=True, slots=True)
class Header:
    """What an encoded image says of itself; height and width as seen, that is after the EXIF rotation."""

    format: str
    height: int
    width: int
    orientation: int = 1
    """EXIF orientation, 1 to 8; 5 to 8 exchange height and width. The only reading of it: decoders are told."""
    decoder: Route = "any"
    """Who reads it right as RGB: DALI and Pillow to the same bits, or one of them; neither reads an array."""
    channels: int = 3
    """As stored, transparency counted; palettes and CMYK count as the 3 colours they stand for."""
    depth: str = "uint8"
    """NumPy's name of the type of a pixel."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why an image cannot be used."""

    reason: str


class _Broken(Exception):
    """The reason, on its way to a Rejection."""


def screen(data: bytes) -> Header | Rejection:
    """Header of an image that the decoders take, or the reason why not. Costs some 10 to 50 microseconds."""
    if not data:
        return Rejection("empty file")
    try:
        for magic, parse in _PARSERS:
            if data.startswith(magic):
                header = parse(data)
                break
        else:
            return Rejection(_unknown(data))
    except _Broken as broken:
        return Rejection(str(broken))
    except (struct.error, IndexError, ValueError):
        return Rejection("header cut off")
    if header.height < 1 or header.width < 1:
        return Rejection(f"{header.format} of {header.width} x {header.height} pixels")
    if header.height * header.width > MAX_PIXELS:
        size = f"{header.width} x {header.height} = {header.height * header.width / 1e6:.0f}"
        return Rejection(f"{size} megapixels; at most {MAX_PIXELS / 1e6:.0f} are decoded")
    return header


def _header(
    kind: str, height: int, width: int, orientation: int = 1, decoder: Route = "any", channels: int = 3,
    depth: str = "uint8",
) -> Header:  # fmt: skip
    orientation = orientation if 1 <= orientation <= 8 else 1
    height, width = (width, height) if orientation >= 5 else (height, width)
    return Header(kind, height, width, orientation, decoder, channels, depth)


def _jpeg(data: bytes) -> Header:
    size: tuple[int, int] | None = None
    orientation, offset, channels = 1, 2, 3
    route: Route = "any"
    while True:
        if data[offset] != 0xFF:  # Pillow looks for the next marker, as libjpeg does; DALI gives up
            offset, route = data.index(b"\xff", offset), "pillow"
            continue
        marker = data[offset + 1]
        if marker == 0xFF:  # fill byte
            offset += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
            offset += 2
            continue
        if marker == 0xDA:  # scan
            break
        if marker == 0xD9:
            raise _Broken("JPEG without a scan")
        (length,) = struct.unpack_from(">H", data, offset + 2)
        if marker in (0xC0, 0xC1, 0xC2):
            precision, height, width, components = struct.unpack_from(">BHHB", data, offset + 4)
            if precision != 8:
                raise _Broken(f"JPEG of {precision} bits per sample; 8 are supported")
            if components not in (1, 3, 4):
                raise _Broken(f"JPEG of {components} components")
            size, channels = (height, width), 1 if components == 1 else 3
        elif 0xC3 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            raise _Broken("JPEG of an unsupported coding (lossless, hierarchical or arithmetic)")
        elif marker == 0xE1 and data.startswith(b"Exif\0\0", offset + 4):
            orientation = _exif_orientation(data[offset + 10 : offset + 2 + length])
        offset += 2 + length
    if size is None:
        raise _Broken("JPEG without a frame header")
    # A thumbnail in the header has an end marker of its own: only one behind the scan counts.
    if data.rfind(b"\xff\xd9", max(offset, len(data) - _TAIL)) < 0 and not _has_end(data, offset):
        raise _Broken("JPEG cut off (no end marker)")
    return _header("jpeg", *size, orientation, route, channels)


def _has_end(data: bytes, offset: int) -> bool:
    """Whether the scans that begin at `offset` end, whatever lies behind (the film of a motion photo)."""
    while offset < len(data) and data[offset + 1] != 0xD9:
        (length,) = struct.unpack_from(">H", data, offset + 2)
        marker = _JPEG_MARKER.search(data, offset + 2 + length)
        if marker is None:
            return False
        offset = marker.end() - 2
    return offset < len(data)


def _png(data: bytes) -> Header:
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    if data[12:16] != b"IHDR":
        raise _Broken("PNG with a damaged header")
    orientation, offset, kind = 1, 8, b""
    while kind != b"IDAT" and offset + 8 <= len(data):
        (length,), kind = struct.unpack_from(">I", data, offset), data[offset + 4 : offset + 8]
        if kind == b"eXIf":
            orientation = _exif_orientation(data[offset + 8 : offset + 8 + length])
        offset += 12 + length
    if data.rfind(b"IEND", max(0, len(data) - _TAIL)) < 0 and data.find(b"\0\0\0\0IEND\xae\x42\x60\x82", offset) < 0:
        raise _Broken("PNG cut off (no end chunk)")
    # Of 16-bit colours Pillow keeps the higher byte; gray ones it gives whole.
    route: Route = "dali" if depth == 16 and colour != 0 else "any"
    channels = {0: 1, 4: 2, 6: 4}.get(colour, 3)
    return _header("png", height, width, orientation, route, channels, "uint16" if depth == 16 else "uint8")


def _webp(data: bytes) -> Header:
    if data[8:12] != b"WEBP":
        raise _Broken("RIFF file that is not WebP")
    (length,) = struct.unpack_from("<I", data, 4)
    if 8 + length > len(data) + 1:  # an odd length is padded, and the last pad byte is often left out
        raise _Broken("WebP cut off")
    kind, orientation = data[12:16], 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return _header("webp", height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        alpha = 4 if bits >> 28 & 1 else 3
        return _header("webp", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, channels=alpha)
    if kind != b"VP8X":
        raise _Broken("WebP with a damaged header")
    flags = data[20]
    if flags & 0x02:
        raise _Broken("animated WebP")
    width = int.from_bytes(data[24:27], "little") + 1
    height = int.from_bytes(data[27:30], "little") + 1
    if flags & 0x08:
        offset = 12
        while offset + 8 <= len(data):
            (size,) = struct.unpack_from("<I", data, offset + 4)
            if data[offset : offset + 4] == b"EXIF":
                orientation = _exif_orientation(data[offset + 8 : offset + 8 + size].removeprefix(b"Exif\0\0"))
            offset += 8 + size + size % 2
    return _header("webp", height, width, orientation, channels=4 if flags & 0x10 else 3)


def _bmp(data: bytes) -> Header:
    pixels_at, header_size = struct.unpack_from("<II", data, 10)
    if header_size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    if compression == 0 and pixels_at + (abs(width) * bits + 31) // 32 * 4 * abs(height) > len(data):
        raise _Broken("BMP cut off")
    return _header("bmp", abs(height), width, decoder="any" if compression == 0 and bits in (8, 24) else "pillow")


def _tiff(data: bytes) -> Header:
    order = "<" if data.startswith(b"II") else ">"
    tags = _ifd(data, order, struct.unpack_from(order + "I", data, 4)[0])
    if 256 not in tags or 257 not in tags:
        raise _Broken("TIFF without a size")
    for starts, lengths in ((273, 279), (324, 325)):  # strips, tiles
        for start, length in zip(tags.get(starts, ()), tags.get(lengths, ()), strict=False):
            if start + length > len(data):
                raise _Broken("TIFF cut off")
    orientation, channels, depth = tags.get(274, (1,))[0], tags.get(277, (1,))[0], tiff_depth(tags)
    if tags.get(262, (0,))[0] in (3, 5, 6, 8):  # palette, CMYK, YCbCr, Lab stand for colours
        channels = 3
    return _header("tiff", tags[257][0], tags[256][0], orientation, _tiff_route(tags), channels, depth)


def _tiff_route(tags: dict[int, tuple[int, ...]]) -> Route:
    """Who reads the pixels as they are meant: DALI takes every TIFF for unsigned RGB or gray."""
    bits, photometric = set(tags.get(258, (1,))), tags.get(262, (0,))[0]
    if set(tags.get(339, (1,))) != {1} or photometric not in (1, 2) or tags.get(284, (1,))[0] != 1:
        return "pillow"  # signed or float, palette, CMYK, Lab, YCbCr, white is 0, planes
    if bits == {8}:
        return "any"
    return "dali" if bits == {16} and photometric == 2 else "pillow"


def _pnm(data: bytes) -> Header:
    words: list[int] = []
    offset = 2
    while len(words) < 3:  # width, height, largest value: numbers between blanks and comments
        while data[offset : offset + 1].isspace() or data[offset] == ord("#"):
            offset = data.index(b"\n", offset) + 1 if data[offset] == ord("#") else offset + 1
        end = offset
        while data[end : end + 1].isdigit():
            end += 1
        words.append(int(data[offset:end]))
        offset = end
    width, height, largest = words
    size = width * height * (3 if data[1:2] == b"6" else 1) * (2 if largest > 255 else 1)
    if offset + 1 + size > len(data):
        raise _Broken("PNM cut off")
    channels, depth = 1 if data[1:2] == b"5" else 3, "uint16" if largest > 255 else "uint8"
    return _header("pnm", height, width, 1, "any" if largest == 255 else "pillow", channels, depth)


def _npy(data: bytes) -> Header:
    try:
        layout = npy_layout(data)
    except ValueError as error:
        raise _Broken(f"array that cannot be read ({error})") from None
    if len(data) < layout.offset + layout.nbytes:
        raise _Broken("array cut off")
    return _header("npy", layout.height, layout.width, 1, "array", layout.channels, layout.dtype.name)


_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}  # of TIFF


def _ifd(data: bytes, order: str, offset: int) -> dict[int, tuple[int, ...]]:
    """Integer entries of a TIFF directory (also that of EXIF)."""
    (count,) = struct.unpack_from(order + "H", data, offset)
    tags: dict[int, tuple[int, ...]] = {}
    for entry in range(offset + 2, offset + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(order + "HHI", data, entry)
        letter = _INTEGERS.get(kind)
        if letter is None or number > 1_000_000:
            continue
        layout = f"{order}{number}{letter}"
        start = entry + 8 if struct.calcsize(layout) <= 4 else struct.unpack_from(order + "I", data, entry + 8)[0]
        tags[tag] = struct.unpack_from(layout, data, start)
    return tags


def without_orientation(tiff: bytes) -> bytes:
    """Return the TIFF with its orientation set to 1, for a decoder that would apply its own reading of it."""
    order = "<" if tiff.startswith(b"II") else ">"
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from(order + "H", tiff, entry)[0] == 274:
            return tiff[:entry] + struct.pack(order + "HHIHH", 274, 3, 1, 1, 0) + tiff[entry + 12 :]
    return tiff


def _exif_orientation(exif: bytes) -> int:
    """The orientation, 1 where EXIF is absent or damaged (the image itself may be fine)."""
    try:
        order = "<" if exif.startswith(b"II") else ">"
        return _ifd(exif, order, struct.unpack_from(order + "I", exif, 4)[0]).get(274, (1,))[0]
    except (struct.error, IndexError):
        return 1


_PARSERS = (
    (b"\xff\xd8\xff", _jpeg),
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"RIFF", _webp),
    (b"BM", _bmp),
    (b"II*\0", _tiff),
    (b"MM\0*", _tiff),
    (b"P6", _pnm),
    (b"P5", _pnm),
    (b"\x93NUMPY", _npy),
)


def _unknown(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if start.startswith((b"<html", b"<!doctype", b"<?xml", b"<head")):
        return "a web page, not an image"
    if data.startswith(b"GIF8"):
        return "GIF is not supported"
    if data[4:8] == b"ftyp":
        return f"{data[8:12].decode('latin1').strip().upper()} is not supported"
    return f"unknown format (starts with {data[:4].hex(' ')})"


class TooManyBadImages(RuntimeError):
    """More images cannot be used than the run allows."""


class BadImages:
    """Counts and names the images that cannot be used; ends the run where they are too many.

    Each file counts once, however often an epoch meets it. `TooManyBadImages` is raised where more than `max_share` of
    all `total` images are bad (one always passes), or, early, more than 1 in 20 of those looked at after 16 bad ones.

    A line `path<TAB>reason` per file is appended to `path`, `bad_files.tsv` of the run, when one is given; processes
    may share the file.
    """

    def __init__(self, total: int, path: str | os.PathLike[str] | None = None, max_share: float = 0.01) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share of bad images must be in [0, 1], got {max_share}")
        self.total = total
        self.max_share = max_share
        self._path = path
        self._reasons: dict[str, str] = {}
        self._looked_at = 0
        self._met = 0
        self._lock = threading.Lock()
        self._written: set[str] = set()
        if path is not None and os.path.exists(path):  # a resumed run: no line twice
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                self._written = {line.split("\t", 1)[0] for line in file}

    def __len__(self) -> int:
        """Distinct bad images so far, those that the run listed before it was resumed included."""
        with self._lock:
            return len(self._written.union(map(_one_line, self._reasons)))

    @property
    def reasons(self) -> dict[str, str]:
        """Reason by name, in the order in which they were met."""
        with self._lock:
            return dict(self._reasons)

    def looked_at(self, count: int) -> None:
        """Report images that were tried, good or bad."""
        with self._lock:
            self._looked_at += count

    def add(self, name: str, reason: str) -> None:
        """Report a bad image: counted, written down, warned of at the first time."""
        with self._lock:
            self._met += 1
            if name in self._reasons:
                return
            self._reasons[name] = reason
            if self._path is not None and _one_line(name) not in self._written:
                line = f"{_one_line(name)}\t{_one_line(reason)}\n"
                file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                try:
                    os.write(file, line.encode("utf-8", "surrogateescape"))
                finally:
                    os.close(file)
            if len(self._reasons) <= 20:
                logger.warning("bad image replaced: %s (%s)", name, reason)
            elif len(self._reasons) == 21:
                logger.warning("further bad images are counted and listed, not shown")
            count = len(self._reasons)
            # In early batches a random order may well show more than the share of the whole.
            early = count > 16 and self._met > max(self.max_share, 0.05) * self._looked_at
            if count > max(1, int(self.max_share * self.total)) or (early and self.max_share < 1):
                raise TooManyBadImages(self._summary())

    def _summary(self) -> str:
        shown = "; ".join(f"{name} ({reason})" for name, reason in list(self._reasons.items())[:3])
        where = f"; all of them: {self._path}" if self._path is not None else ""
        return (
            f"{len(self._reasons)} of {self.total} images cannot be used (allowed: {self.max_share:.0%}): "
            f"{shown}{where}; remove them, or check that the path and the copy are right"
        )


def _one_line(text: str) -> str:
    return text.replace("\t", " ").replace("\n", " ").replace("\r", " ")
