"""Images of any channels and depth: read to the bit, mixed kinds refused, views as of bytes."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.data.arrays.decoding import ArrayDecoder
from beit_fast.data.arrays.tiff import UnsupportedTiff, read_tiff
from beit_fast.data.augmentation.color_jitter import jitter_floats
from beit_fast.data.classification import Augmentation, ClassificationLoader, EvaluationLoader, evaluation_geometry
from beit_fast.data.loader import Request
from beit_fast.data.pretraining import PretrainLoader
from beit_fast.data.reading import common_kind, read_picture, read_screened
from beit_fast.data.sampling import BlockwiseMasking, CropSampler
from beit_fast.data.screening import Rejection, screen
from beit_fast.data.sources import ArraySource, FolderSource, open_source

DEPTHS = {"uint8": 255, "uint16": 65535, "float32": None, "int16": None}


def pixels(height=40, width=30, channels=1, dtype="uint16", seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=(height, width, channels)).astype(dtype)
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, (height, width, channels), dtype, endpoint=True)


def tiff(array, order="<", packed=False, predictor=1, planar=False, tile=None, rows=7, photometric=1, compression=None):
    """A TIFF written by its specification, independently of the reader."""
    height, width, channels = array.shape
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    planes = [array[..., c : c + 1] for c in range(channels)] if planar else [array]
    parts = []
    for plane in planes:
        step_down, step_across = (tile, tile) if tile else (rows, width)
        for top in range(0, height, step_down):
            for left in range(0, width, step_across):
                block = plane[top : top + step_down, left : left + step_across]
                if tile:
                    block = np.pad(block, [(0, tile - block.shape[0]), (0, tile - block.shape[1]), (0, 0)])
                if predictor == 2:
                    block = np.concatenate([block[:, :1], np.diff(block, axis=1)], 1)
                data = block.astype(array.dtype.newbyteorder(order)).tobytes()
                if predictor == 3:
                    flat = block.astype(array.dtype.newbyteorder(">")).reshape(block.shape[0], -1)
                    size = array.dtype.itemsize
                    rows_ = []
                    for row in flat:
                        raw = np.frombuffer(row.tobytes(), np.uint8).reshape(-1, size).T.reshape(-1).copy()
                        depth = block.shape[2]
                        raw[depth:] = raw[depth:] - raw[:-depth]
                        rows_.append(raw.tobytes())
                    data = b"".join(rows_)
                parts.append(zlib.compress(data) if packed else data)
    tags = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [array.dtype.itemsize * 8] * channels),
        259: ("H", [compression or (8 if packed else 1)]), 262: ("H", [photometric]), 277: ("H", [channels]),
        284: ("H", [2 if planar else 1]), 317: ("H", [predictor]), 339: ("H", [kind] * channels),
    }  # fmt: skip
    body, offsets = b"", []
    for part in parts:
        offsets.append(8 + len(body))
        body += part
    if tile:
        tags |= {322: ("I", [tile]), 323: ("I", [tile]), 324: ("I", offsets), 325: ("I", [len(p) for p in parts])}
    else:
        tags |= {278: ("I", [rows]), 273: ("I", offsets), 279: ("I", [len(p) for p in parts])}
    extra, entries = b"", []
    extra_at = 8 + len(body)
    for tag, (letter, values) in sorted(tags.items()):
        raw = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(raw) > 4:
            place = struct.pack(order + "I", extra_at + len(extra))
            extra += raw
        else:
            place = raw.ljust(4, b"\0")
        entries.append(struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[letter], len(values)) + place)
    directory = struct.pack(order + "H", len(entries)) + b"".join(entries) + b"\0\0\0\0"
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", extra_at + len(extra))
    return head + body + extra + directory


def encode(array, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).save(buffer, kind, **options)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


TIFFS = {
    "stored": {}, "big_endian": {"order": ">"}, "deflated": {"packed": True}, "planes": {"planar": True},
    "differences": {"packed": True, "predictor": 2}, "tiles": {"tile": 16}, "one_strip": {"rows": 1000},
    "tiles_of_planes": {"tile": 16, "planar": True, "packed": True, "order": ">"},
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("layout", sorted(TIFFS))
def test_a_tiff_is_read_to_the_bit(channels, dtype, layout):
    if dtype == "float32" and layout == "differences":
        layout_options = {"packed": True, "predictor": 3}
    else:
        layout_options = TIFFS[layout]
    expected = pixels(channels=channels, dtype=dtype)
    np.testing.assert_array_equal(read_tiff(tiff(expected, **layout_options)), expected)
    header = screen(tiff(expected, **layout_options))
    assert (header.height, header.width, header.channels, header.depth) == (40, 30, channels, dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_pillow_reads_what_this_file_writes(dtype):
    """The writer above is no mirror of the reader: Pillow, and Pillow's own TIFF, agree with it."""
    expected = pixels(dtype=dtype)
    for options in (TIFFS["stored"], TIFFS["deflated"], TIFFS["differences"]):
        image = np.asarray(Image.open(io.BytesIO(tiff(expected, **options))))
        np.testing.assert_array_equal(image, expected[..., 0])
    for packing in ("raw", "tiff_deflate", "tiff_adobe_deflate"):
        np.testing.assert_array_equal(read_tiff(encode(expected, "TIFF", compression=packing)), expected)


def test_damage_and_other_packings_are_told_apart():
    data = tiff(pixels(), packed=True)
    with pytest.raises(OSError, match="damaged"):
        read_tiff(data[:20] + b"\xff" * 40 + data[60:])
    with pytest.raises(UnsupportedTiff, match="packed by LZW; save it unpacked or deflated"):
        read_tiff(tiff(pixels(channels=4), compression=5))


def whole(header):
    return np.array([(0, 0, header.height, header.width)], np.int32)


FILES = {
    "png_16": (encode(pixels(), "PNG"), 1, "uint16"),
    "png_8": (encode(pixels(dtype="uint8"), "PNG"), 1, "uint8"),
    "png_rgb": (encode(pixels(channels=3, dtype="uint8"), "PNG"), 3, "uint8"),
    "png_rgba": (encode(pixels(channels=4, dtype="uint8"), "PNG"), 4, "uint8"),
    "tiff_lzw": (encode(pixels(), "TIFF", compression="tiff_lzw"), 1, "uint16"),
    "pgm_16": (b"P5\n30 40\n65535\n" + pixels().astype(">u2").tobytes(), 1, "uint16"),
    "npy": (npy(pixels(channels=4, dtype="uint16")), 4, "uint16"),
    "npy_fortran": (npy(np.asfortranarray(pixels(channels=4))), 4, "uint16"),
    "npy_flat": (npy(pixels()[..., 0]), 1, "uint16"),
}


@pytest.mark.parametrize("decoder", ["pil", "dali"])
@pytest.mark.parametrize("name", sorted(FILES))
def test_pixels_are_those_that_were_written(name, decoder):
    data, channels, dtype = FILES[name]
    header = screen(data)
    assert (header.height, header.width, header.channels, header.depth) == (40, 30, channels, dtype)
    expected = pixels(channels=channels, dtype=dtype)
    opened = ArrayDecoder(decoder)
    crop = opened.decode([data], [header], whole(header))[0]
    np.testing.assert_allclose(crop, expected.astype(np.float64) / DEPTHS[dtype], atol=1e-7)
    part = opened.decode([data], [header], np.array([(3, 4, 20, 10)], np.int32))[0]
    np.testing.assert_array_equal(part, crop[3:23, 4:14])


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colours_in_a_png(kind, channels):
    """Written by hand: Pillow keeps half of their bits. Grey with transparency is read whole by neither."""
    array = pixels(8, 6, channels)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", 6, 8, 16, kind, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    header = screen(data)
    for decoder in ("dali", "pil"):
        crop = ArrayDecoder(decoder).decode([data], [header], whole(header))[0]
        if channels == 2:
            assert crop == Rejection("16-bit grey PNG with transparency; save it as TIFF or .npy")
        else:
            np.testing.assert_allclose(crop, array / 65535.0, atol=1e-7)


def test_jpeg_and_photographs_are_the_same_by_both_decoders(photographs):
    gray = io.BytesIO()
    Image.open(io.BytesIO(photographs[0])).convert("L").save(gray, "JPEG")
    for data, channels in ((photographs[0], 3), (gray.getvalue(), 1)):
        header = screen(data)
        assert header.channels == channels
        dali, pil = (ArrayDecoder(name).decode([data], [header], whole(header))[0] for name in ("dali", "pil"))
        np.testing.assert_array_equal(dali, pil)


def test_the_value_range_says_what_is_black_and_white():
    array = pixels(dtype="float32")
    data = npy(array)
    crop = ArrayDecoder("pil", 1, (-1.0, 2.0)).decode([data], [screen(data)], whole(screen(data)))[0]
    np.testing.assert_allclose(crop, np.clip((array + 1) / 3, 0, 1), atol=1e-6)
    with pytest.raises(ValueError, match="below the second"):
        ArrayDecoder("pil", 1, (2.0, 2.0))


def source_of(tmp_path, files):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return open_source(tmp_path)


def test_mixed_kinds_and_missing_scales_are_one_line(tmp_path):
    gray, colour, eight = npy(pixels()), npy(pixels(channels=3)), npy(pixels(dtype="uint8"))
    source = source_of(tmp_path, {"a.npy": gray, "b.npy": colour})
    with pytest.raises(ValueError, match=r"a\.npy has 1 x uint16, of an array \(H, W, C\), --data\.channels is 3"):
        common_kind(source, 3)
    loader = EvaluationLoader(source, np.zeros(2, np.int64), image_size=16, channels=1)
    with pytest.raises(ValueError, match=r"b\.npy has 3 x uint16, .*a\.npy has 1 x uint16.*all images must be of one"):
        list(loader.batches(2))
    loader.close()
    (tmp_path / "b.npy").write_bytes(eight)
    masking, sampler = BlockwiseMasking((2, 2), 1, min_num_patches=1), CropSampler()
    with PretrainLoader(source, masking, sampler, seed=0, image_size=16, token_image_size=16, channels=1) as views:
        with pytest.raises(ValueError, match=r"b\.npy has 1 x uint8, .*a\.npy has 1 x uint16") as failure:
            list(views.batches([Request(0, np.arange(2))]))
        assert "\n" not in str(failure.value)
    with pytest.raises(ValueError, match=r"1 x float32, which has no scale of its own: --data\.value-range LOW HIGH"):
        common_kind(ArraySource([pixels(dtype="float32")]), 1)


def test_arrays_count_as_images_only_where_nothing_else_does(tmp_path):
    features = npy(np.zeros((4, 5)))
    assert len(source_of(tmp_path, {"a.npy": features})) == 1
    source = source_of(tmp_path, {"b.png": encode(pixels(), "PNG")})
    assert len(source) == 1
    assert source.contents.skipped["suffix .npy"][0] == 1


def test_an_array_is_refused_where_all_becomes_rgb(tmp_path):
    (tmp_path / "a.npy").write_bytes(npy(pixels()))
    rejected = read_picture(tmp_path / "a.npy")
    assert rejected == Rejection("an array; --data.channels N reads arrays of N channels")
    np.testing.assert_allclose(read_picture(tmp_path / "a.npy", None, 1), pixels() / 65535.0, atol=1e-7)
    assert "--data.channels is 2; give --data.channels 1" in read_picture(tmp_path / "a.npy", None, 2).reason


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_eight_bit_views_are_those_of_the_byte_path_within_rounding(channels):
    """The float path on bytes: three channels against the compiled one, others against their single channels."""
    arrays = [pixels(50, 60, channels, "uint8", seed) // 2 + 60 for seed in range(6)]
    masking = BlockwiseMasking((2, 4), 3, min_num_patches=1)
    sampler = CropSampler(brightness=0.2, contrast=0.2, saturation=0.2)
    options = {"seed": 1, "image_size": (16, 32), "token_image_size": (8, 16), "decoder": "pil"}
    request = Request(0, np.arange(6))

    def batch_of(source, **more):
        norm = {"mean": (0.5,) * more.get("channels", 3), "std": (0.5,) * more.get("channels", 3)}
        with PretrainLoader(source, masking, sampler, **options, **more, **norm) as loader:
            return next(iter(loader.batches([request])))

    found = batch_of(ArraySource(arrays), channels=channels)
    assert found.images.shape == (6, channels, 16, 32)
    assert found.token_images.shape == (6, channels, 8, 16)
    assert found.mask.shape == (6, 2, 4)
    if channels == 3:
        expected = batch_of(ArraySource(arrays))
        assert (found.images - expected.images).abs().mean() < 2 / 127.5
        assert (found.token_images - expected.token_images).abs().max() < 3 / 255
    assert torch.equal(found.mask, batch_of(ArraySource([a[..., :1] for a in arrays]), channels=1).mask)


def test_saturation_is_left_out_of_other_channels():
    views = torch.rand(2, 5, 6, 4)
    flips, centers = torch.tensor([True, False]), torch.tensor([0.4, 0.5])
    factors = torch.tensor([[1.2, 0.8, 0.1], [0.9, 1.1, 2.0]])
    found = jitter_floats(views, flips, factors, centers, (0.0,) * 4, (1.0,) * 4)
    expected = views.permute(0, 3, 1, 2).double()
    b, c, m = (x.double()[:, None, None, None] for x in (factors[:, 0], factors[:, 1], centers))
    expected = ((expected * b).clamp(0, 1) * c + (1 - c) * b * m).clamp(0, 1)
    expected[0] = expected[0].flip(2)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)


def test_rand_augment_is_refused():
    from beit_fast.data.augmentation.rand_augment import RandAugment

    with pytest.raises(ValueError, match=r"--augment\.rand-augment 0"):
        ClassificationLoader(
            ArraySource([pixels()]), np.zeros(1, np.int64), Augmentation(rand_augment=RandAugment()), seed=0, channels=1
        )


def test_a_view_that_is_not_square_is_covered():
    for height, width in ((40, 90), (90, 40), (16, 32), (10, 10)):
        for share in (0.875, 1.0):
            tall, wide, top, left = evaluation_geometry(height, width, (16, 32), share)
            assert 0 <= top <= tall - 16
            assert 0 <= left <= wide - 32
            assert abs(tall / wide - height / width) < 0.1 * height / width


def test_an_array_that_is_cut_off_is_refused(tmp_path):
    data = npy(pixels())
    assert screen(data[:-5]) == Rejection("array cut off")
    assert isinstance(screen(npy(np.zeros((2, 3, 4, 5)))), Rejection)
    source = FolderSource(tmp_path, ["a.npy"])
    assert isinstance(read_screened(source, 0), Rejection)
