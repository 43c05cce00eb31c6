"""Encoded images of many kinds, good, odd and broken, made from the committed photographs."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import beit_fast.data

PHOTOGRAPHS = Path(beit_fast.data.__file__).parent / "photographs"


def encode(image, kind="JPEG", orientation=None, **options):
    if orientation is not None:
        exif = Image.Exif()
        exif[274] = orientation
        options["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(name="chelsea", size=(160, 120)):
    return Image.open(PHOTOGRAPHS / f"{name}.jpg").convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _good():
    image = photograph()
    gray, alpha = image.convert("L"), image.copy()
    alpha.putalpha(gray)
    sixteen = Image.fromarray((np.asarray(gray).astype(np.uint16) << 8) + 77)
    return {
        "jpeg": encode(image, quality=90),
        "jpeg_444": encode(image, quality=95, subsampling=0),
        "jpeg_gray": encode(gray),
        "jpeg_cmyk": encode(image.convert("CMYK")),
        "jpeg_progressive": encode(image, progressive=True),
        "jpeg_restart_markers": encode(image, restart_marker_blocks=4),
        "jpeg_trailing_bytes": encode(image) + b"\0" * 3000,
        **{f"jpeg_orientation_{turn}": encode(image, orientation=turn) for turn in range(2, 9)},
        "png": encode(image, "PNG"),
        "png_gray": encode(gray, "PNG"),
        "png_gray_alpha": encode(alpha.convert("LA"), "PNG"),
        "png_alpha": encode(alpha, "PNG"),
        "png_palette": encode(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "png_16_bit_gray": encode(sixteen, "PNG"),
        "png_orientation_6": encode(image, "PNG", orientation=6),
        "webp": encode(image, "WEBP", quality=80),
        "webp_lossless": encode(image, "WEBP", lossless=True),
        "webp_orientation_8": encode(image, "WEBP", orientation=8, lossless=True),
        "bmp": encode(image, "BMP"),
        "tiff": encode(image, "TIFF"),
        "tiff_orientation_6": encode(image, "TIFF", orientation=6),
        "ppm": encode(image, "PPM"),
        "pgm": encode(gray, "PPM"),
        "one_pixel": encode(image.crop((0, 0, 1, 1)), "PNG"),
        "panorama": encode(image.resize((3000, 2)), quality=90),
    }


def _segment(marker, body):
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def _without(jpeg, marker):
    """The JPEG without its first segment of this kind."""
    start = jpeg.index(b"\xff" + bytes([marker]))
    (length,) = struct.unpack_from(">H", jpeg, start + 2)
    return jpeg[:start] + jpeg[start + 2 + length :]


def _patched(data, place, value):
    return data[:place] + value + data[place + len(value) :]


def _broken():
    """Kinds of file that the screening must refuse."""
    image = photograph()
    jpeg, png, webp = encode(image, quality=90), encode(image, "PNG"), encode(image, "WEBP")
    frame = jpeg.index(b"\xff\xc0")
    small = encode(image.resize((32, 24)), quality=30)
    thumbnailed = jpeg[:2] + _segment(0xE1, b"Other\0" + small) + jpeg[2:]
    random = np.random.default_rng(0).bytes(4000)
    frames = [image, image.rotate(90)]
    return {
        "empty": b"",
        "one_byte": b"\xff",
        "web_page": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>",
        "random_bytes": b"\x01" + random,
        "zeros": b"\0" * 5000,
        "gif": encode(image, "GIF"),
        "avif": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf" + random,
        "jpeg_of_100_bytes": jpeg[:100],
        "jpeg_half": jpeg[: len(jpeg) // 2],
        "jpeg_20_bytes_missing": jpeg[:-20],
        "jpeg_cut_behind_its_thumbnail": thumbnailed[: frame + len(small) + 60],
        "jpeg_without_frame": _without(jpeg, 0xC0),
        "jpeg_without_scan": jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9",
        "jpeg_of_height_0": _patched(jpeg, frame + 5, b"\0\0"),
        "jpeg_lossless": _patched(jpeg, frame, b"\xff\xc3"),
        "jpeg_12_bit": _patched(jpeg, frame + 4, b"\x0c"),
        "jpeg_144_megapixels": _patched(jpeg, frame + 5, struct.pack(">HH", 12000, 12000)),
        "png_half": png[: len(png) // 2],
        "png_damaged_header": _patched(png, 12, b"IHXR"),
        "webp_half": webp[: len(webp) // 2],
        "webp_animated": encode(image, "WEBP", save_all=True, append_images=frames, duration=10),
        "riff_sound": b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + random[:40],
        "bmp_half": encode(image, "BMP")[:20000],
        "tiff_half": encode(image, "TIFF")[:20000],
        "ppm_half": encode(image, "PPM")[:20000],
        "numpy_file": b"\x93NUMPY\x01\0" + random,
    }


def _damaged():
    """Intact by their header and end; only a decoder finds out."""
    image = photograph()
    png = encode(image, "PNG")
    body = png.index(b"IDAT") + 300
    lossless = encode(image, "WEBP", lossless=True)
    noise = np.random.default_rng(1).bytes(2000)
    jpeg = encode(image, quality=90)
    table = jpeg.index(b"\xff\xc4")
    return {
        "png_damaged_body": _patched(png, body, noise[:200]),
        "webp_damaged_body": _patched(lossless, 40, noise),
        "jpeg_damaged_tables": _patched(jpeg, table + 5, b"\xff" * 16),
    }


@pytest.fixture(scope="session")
def good_files():
    return _good()


@pytest.fixture(scope="session")
def broken_files():
    return _broken()


@pytest.fixture(scope="session")
def damaged_files():
    return _damaged()


@pytest.fixture(scope="session")
def photographs():
    """Eight JPEG files of different sizes and shapes."""
    sizes = [(150, 100), (100, 150), (128, 128), (200, 90), (90, 64), (64, 120), (180, 140), (110, 110)]
    names = ["astronaut", "chelsea", "coffee", "ihc", "retina", "rocket", "hubble_deep_field", "chelsea"]
    return [encode(photograph(name, size), quality=92) for name, size in zip(names, sizes, strict=True)]
