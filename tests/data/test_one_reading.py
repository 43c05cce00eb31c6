"""One reading of every kind of image: the same pixels in training, evaluation, prediction and segmentation."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.data.classification import Augmentation, ClassificationLoader, EvaluationLoader
from beit_fast.data.decoding import DaliDecoder, PilDecoder
from beit_fast.data.loader import Request
from beit_fast.data.pretraining import PretrainLoader
from beit_fast.data.reading import Sample, read_picture
from beit_fast.data.resizing import CpuResizer, DaliResizer
from beit_fast.data.sampling import BlockwiseMasking, CropSampler
from beit_fast.data.screening import BadImages, Header, Rejection, TooManyBadImages, screen
from beit_fast.data.segmentation import LabelRule, SegmentationImages
from beit_fast.data.segmentation_loader import WholeImages
from beit_fast.data.sources import open_source

SIDE = 32
Y, X = np.mgrid[:SIDE, :SIDE]
RGB = np.stack([X * 8, Y * 8, (X + Y) * 4], -1).astype(np.uint8)
GRAY = (X * 5 + Y * 3).astype(np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint16)
DEEP_RGB, DEEP_GRAY = RGB.astype(np.uint16) << 8 | NOISE, GRAY.astype(np.uint16) << 8 | NOISE[..., 0]


def encode(pixels, kind, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(rows, depth, colour):
    """A PNG of rows of bytes, which Pillow cannot write in 16-bit colours."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(pixels, photometric, sample_format=1):
    """An uncompressed TIFF of one strip; pixels (H, W) or (H, W, C) of 8, 16 or 32 bits."""
    samples = 1 if pixels.ndim == 2 else pixels.shape[2]
    data, bits = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes(), pixels.dtype.itemsize * 8
    entries = [(256, 4, 1, SIDE), (257, 4, 1, SIDE), (258, 3, samples, bits), (259, 3, 1, 1), (262, 3, 1, photometric),
               (273, 4, 1, 0), (277, 3, 1, samples), (278, 4, 1, SIDE), (279, 4, 1, len(data)),
               (339, 3, samples, sample_format)]  # fmt: skip
    extra_at, extra = 8 + 2 + 12 * len(entries) + 4, b""
    table = b""
    for tag, kind, count, value in entries:
        if count > 2:
            value, extra = extra_at + len(extra), extra + struct.pack(f"<{count}H", *[value] * count)
            table += struct.pack("<HHII", tag, kind, count, value)
        else:
            table += struct.pack("<HHI", tag, kind, count) + (
                struct.pack("<HH", value, value if count == 2 else 0) if kind == 3 else struct.pack("<I", value)
            )
    strip = struct.pack("<HHII", 273, 4, 1, 0)
    table = table.replace(strip, struct.pack("<HHII", 273, 4, 1, extra_at + len(extra)))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0) + extra + data


def triple(gray):
    return np.repeat(np.asarray(gray, np.uint8)[..., None], 3, axis=2)


def by_257(values):
    return np.rint(values / 257).astype(np.uint8)


ALPHA = np.dstack([RGB, GRAY])
PALETTE = Image.fromarray(X.astype(np.uint8), "P")
PALETTE.putpalette(bytes(range(3 * SIDE)))
BITS = (X + Y) % 2
CMYK = Image.fromarray(np.dstack([RGB, np.zeros_like(GRAY)]), "CMYK")
KINDS = {
    "png": (encode(RGB, "PNG"), RGB),
    "png gray": (encode(GRAY, "PNG"), triple(GRAY)),
    "png 1-bit": (encode(Image.fromarray(BITS.astype(bool)), "PNG"), triple(255 * BITS)),
    "png 4-bit gray": (png([np.packbits(np.unpackbits((r % 16).astype(np.uint8)[:, None], axis=1)[:, 4:]).tobytes()
                            for r in X], 4, 0), triple(X % 16 * 17)),
    "png palette": (encode(PALETTE, "PNG"), np.stack([X * 3, X * 3 + 1, X * 3 + 2], -1)),
    "png palette with a transparent colour": (encode(PALETTE, "PNG", transparency=3),
                                              np.stack([X * 3, X * 3 + 1, X * 3 + 2], -1)),
    "png transparency": (encode(ALPHA, "PNG"), RGB),
    "png gray with transparency": (encode(Image.fromarray(np.dstack([GRAY, GRAY]), "LA"), "PNG"), triple(GRAY)),
    "png 16-bit gray": (encode(DEEP_GRAY, "PNG"), triple(by_257(DEEP_GRAY))),
    "png 16-bit": (png([row.astype(">u2").tobytes() for row in DEEP_RGB], 16, 2), by_257(DEEP_RGB)),
    "png 16-bit with transparency": (png([r.astype(">u2").tobytes() for r in np.dstack([DEEP_RGB, DEEP_GRAY])], 16, 6),
                                     by_257(DEEP_RGB)),
    "webp": (encode(RGB, "WEBP", lossless=True), RGB),
    "webp transparency": (encode(ALPHA, "WEBP", lossless=True, exact=True), RGB),
    "bmp": (encode(RGB, "BMP"), RGB),
    "bmp palette": (encode(PALETTE, "BMP"), np.stack([X * 3, X * 3 + 1, X * 3 + 2], -1)),
    "ppm": (encode(RGB, "PPM"), RGB),
    "pgm 16-bit": (b"P5 32 32 65535\n" + DEEP_GRAY.astype(">u2").tobytes(), triple(by_257(DEEP_GRAY))),
    "ppm 16-bit": (b"P6 32 32 65535\n" + DEEP_RGB.astype(">u2").tobytes(), by_257(DEEP_RGB)),
    "pgm up to 100": (b"P5 32 32 100\n" + X.astype(np.uint8).tobytes(), triple(np.rint(X * 2.55))),
    "tiff": (tiff(RGB, 2), RGB),
    "tiff gray": (tiff(GRAY, 1), triple(GRAY)),
    "tiff where 0 is white": (tiff(255 - GRAY, 0), triple(GRAY)),
    "tiff 1-bit": (encode(Image.fromarray(BITS.astype(bool)), "TIFF"), triple(255 * BITS)),
    "tiff palette": (encode(PALETTE, "TIFF"), np.stack([X * 3, X * 3 + 1, X * 3 + 2], -1)),
    "tiff transparency": (encode(ALPHA, "TIFF"), RGB),
    "tiff CMYK": (encode(CMYK, "TIFF"), 255 - RGB),
    "tiff 16-bit gray": (tiff(DEEP_GRAY, 1), triple(by_257(DEEP_GRAY))),
    "tiff 16-bit": (tiff(DEEP_RGB, 2), by_257(DEEP_RGB)),
}  # fmt: skip
WIDE = {
    "tiff float": (tiff((GRAY / np.float32(255)).astype(np.float32), 1, 3), (0.0, 1.0), triple(GRAY)),
    "tiff float in degrees": (tiff((GRAY - np.float32(100)), 1, 3), (-100.0, 155.0), triple(GRAY)),
    "tiff 32-bit": (tiff(GRAY.astype(np.int32) * 1000, 1, 2), (0.0, 255000.0), triple(GRAY)),
    "tiff signed 16-bit": (tiff(GRAY.astype(np.int16) - 128, 1, 2), (-128.0, 127.0), triple(GRAY)),
}
DECODERS = {"dali": DaliDecoder, "pil": PilDecoder}


def readings(folder, decoder, value_range=None):
    """The one picture of a folder, (H, W, 3) levels, as each part of the program sees it."""
    source = open_source(folder)
    header = screen(source.read(0))
    options = {"decoder": decoder, "threads": 1, "value_range": value_range}
    unit = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    one = [Request(0, np.array([0]))]
    plain = Augmentation(scale=(1, 1), ratio=(1, 1), flip_probability=0)
    with ClassificationLoader(source, np.zeros(1, int), plain, seed=0, image_size=SIDE, **unit, **options) as loader:
        yield "training", next(loader.batches(one)).images[0]
    masking, whole = BlockwiseMasking((4, 4), 6, min_num_patches=2), CropSampler((1, 1), (1, 1), 0, 0, 0, 0)
    with PretrainLoader(source, masking, whole, seed=0, image_size=SIDE, token_image_size=SIDE, **unit, **options) as p:
        batch = next(p.batches(one))
        yield "pre-training", batch.images[0]
        yield "tokens", batch.token_images[0]
    with EvaluationLoader(source, np.zeros(1, int), image_size=SIDE, crop_share=1.0, **unit, **options) as loader:
        yield "evaluation", next(loader.batches(1)).images[0]
    label = folder.parent / "label.png"
    label.write_bytes(encode(np.zeros((SIDE, SIDE), np.uint8), "PNG"))
    pairs = SegmentationImages(source, (label,), LabelRule(2), ("a", "b"))
    with WholeImages(pairs, **options) as loader:
        yield "segmentation", next(loader.images()).pixels.permute(2, 0, 1) / 255
    picture = read_picture(next(folder.iterdir()), value_range)
    assert isinstance(picture, np.ndarray)
    assert picture.shape == (header.height, header.width, 3)
    yield "prediction", np.moveaxis(picture, 2, 0) / 255


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_the_program_sees_the_same_pixels(tmp_path, kind, decoder):
    data, expected = KINDS[kind]
    (tmp_path / "images").mkdir()
    (tmp_path / "images/x.png").write_bytes(data)
    for part, seen in readings(tmp_path / "images", decoder):
        levels = np.asarray(seen).transpose(1, 2, 0) * 255
        assert np.abs(levels - expected).max() < 0.01, part


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", WIDE)
def test_float_and_wide_pixels_need_a_value_range(tmp_path, kind, decoder):
    data, value_range, expected = WIDE[kind]
    (tmp_path / "images").mkdir()
    (tmp_path / "images/x.tif").write_bytes(data)
    for part, seen in readings(tmp_path / "images", decoder, value_range):
        assert np.abs(np.asarray(seen).transpose(1, 2, 0) * 255 - expected).max() < 0.51, part
    refused = read_picture(tmp_path / "images/x.tif")
    assert isinstance(refused, Rejection)
    assert "--data.value-range LOW HIGH" in refused.reason
    source = open_source(tmp_path / "images")
    bad = BadImages(1, max_share=0.0)
    with EvaluationLoader(source, np.zeros(1, int), image_size=SIDE, decoder=decoder, bad_images=bad) as loader:
        assert list(loader.batches(1)) == []
    assert "--data.value-range LOW HIGH" in next(iter(bad.reasons.values()))


def exif(value, kind=3, order="<", before=b""):
    """EXIF with an orientation of TIFF type `kind` (3 short, 4 long, 1 byte, 8 signed short, ...)."""
    letter = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}[kind]
    stored = struct.pack(order + letter, value).ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return before + mark + struct.pack(order + "IHHHI", 8, 1, 274, kind, 1) + stored + struct.pack(order + "I", 0)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [1, 3, 4, 6, 8, 9])
def test_one_reading_of_the_orientation(decoder, kind, order):
    """Of every integer type and byte order; what DALI and Pillow make of it does not matter."""
    plain = np.asarray(Image.open(io.BytesIO(encode(RGB[:24], "JPEG", quality=95))))
    orientations = {
        1: plain, 2: plain[:, ::-1], 3: plain[::-1, ::-1], 4: plain[::-1], 5: plain.transpose(1, 0, 2),
        6: np.rot90(plain, -1), 7: np.rot90(plain, -1)[::-1], 8: np.rot90(plain),
    }  # fmt: skip
    for orientation, expected in orientations.items():
        data = encode(RGB[:24], "JPEG", quality=95)
        segment = b"Exif\0\0" + exif(orientation, kind, order)
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]
        header = screen(data)
        assert (header.orientation, header.height, header.width) == (orientation, *expected.shape[:2])
        windows = np.array([(0, 0, *expected.shape[:2]), (3, 5, 11, 7)], np.int32)
        whole, part = DECODERS[decoder]().decode([data, data], [header, header], windows)
        assert np.array_equal(whole, expected)
        assert np.array_equal(part, expected[3:14, 5:12])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_the_orientation_of_other_formats(decoder, kind):
    for orientation, expected in ((3, RGB[::-1, ::-1]), (6, np.rot90(RGB, -1)), (7, np.rot90(RGB, -1)[::-1])):
        mark = Image.Exif()
        mark[274] = orientation
        data = encode(RGB, kind, exif=mark.tobytes(), **({"lossless": True} if kind == "WEBP" else {}))
        (seen,) = DECODERS[decoder]().decode([data], [screen(data)], np.array([(0, 0, SIDE, SIDE)], np.int32))
        assert np.array_equal(seen, expected)


FILM = b"\0\0\0\x18ftypmp42\0\0\0\0isommp42" + NOISE.astype(np.uint8).tobytes().replace(b"\xff\xd9", b"\0\0") * 80


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "data",
    [
        encode(RGB, "JPEG", quality=95) + FILM,
        encode(RGB, "JPEG", quality=95, progressive=True) + FILM,
        encode(RGB, "JPEG", quality=95, restart_marker_blocks=1) + FILM,
        encode(RGB, "PNG") + FILM,
        encode(RGB, "WEBP", lossless=True) + FILM,
        encode(RGB, "BMP") + FILM,
        tiff(RGB, 2) + FILM,
        b"P6 32 32 255\n" + RGB.tobytes() + FILM,
        encode(RGB, "JPEG", quality=95).replace(b"\xff\xdb", b"\0\0\xff\xdb", 1),
    ],
    ids=["jpeg", "progressive", "restarts", "png", "webp", "bmp", "tiff", "ppm", "bytes between segments"],
)
def test_what_lies_behind_an_image_does_no_harm(data, decoder):
    """Motion photos have a film behind the end marker; 245 kB of it here."""
    header = screen(data)
    assert isinstance(header, Header), header
    (seen,) = DECODERS[decoder]().decode([data], [header], np.array([(0, 0, SIDE, SIDE)], np.int32))
    assert np.abs(seen.astype(int) - RGB).mean() < 4


def test_a_jpeg_that_is_cut_off_stays_refused_with_data_behind_it():
    whole = encode(np.asarray(NOISE, np.uint8), "JPEG", quality=95)
    for cut in (len(whole) - 2, len(whole) - 30, len(whole) // 2):
        assert isinstance(screen(whole[:cut] + b"\0" * 9000), Rejection)


def test_too_many_float_images_end_the_run_with_the_way_out(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.tif").write_bytes(WIDE["tiff float"][0])
    source = open_source(tmp_path)
    loader = ClassificationLoader(source, np.zeros(20, int), Augmentation(), seed=0, image_size=SIDE, threads=1)
    with loader, pytest.raises(TooManyBadImages, match=r"--data\.value-range LOW HIGH"):
        next(loader.batches([Request(0, np.arange(20))]))


def test_the_graph_of_the_gpu_makes_the_views_of_the_cpu():
    """Decoder and both resizes as one DALI graph, on a CPU here; turned, damaged and unreadable images among them."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((160, 120)))
    turned = Image.Exif()
    turned[274] = 6
    encoded = [
        encode(smooth, "JPEG", quality=95), encode(smooth, "JPEG", quality=95, exif=turned.tobytes()),
        encode(CMYK.resize((80, 80)), "TIFF"), encode(smooth, "PNG")[:-4000] + b"\0" * 4000, encode(smooth, "PNG"),
    ]  # fmt: skip
    encoded[3] = encoded[3][:-12] + encode(smooth, "PNG")[-12:]
    samples = [Sample(i, i, data, screen(data)) for i, data in enumerate(encoded)]
    whole = np.array([(0, 0, s.header.height, s.header.width) for s in samples], np.int32)
    windows = CropSampler().sample(0, 0, range(5), whole[:, 2], whole[:, 3]).windows
    windows[3] = whole[3]
    with ThreadPoolExecutor(2) as pool:
        on_cpu = CpuResizer(DaliDecoder(1), pool, 64, 32, False)
        graph = DaliResizer(torch.device("cpu"), 1, on_cpu)
        known = np.array([False, False, False, False, True])
        results = []
        for resizer in (on_cpu, graph):
            views = resizer.empty(5)
            for view in views[:2]:
                view.zero_()
            failed = resizer.resize_into(views, [0, 1, 2], samples[:3], windows[:3], known)
            failed |= resizer.resize_into(views, [3, 4], samples[3:], windows[3:], known)
            assert list(failed) == [3]
            results.append(views)
    expected, seen = results
    for row in (0, 1, 2, 4):
        assert np.abs(expected.images[row].numpy().astype(int) - seen.images[row].numpy()).mean() < 0.5
    for row in (0, 1, 2):
        assert np.abs(expected.token_images[row].numpy().astype(int) - seen.token_images[row].numpy()).mean() < 0.5
    assert torch.equal(expected.images[2], seen.images[2])  # the TIFF takes the CPU's way in both
