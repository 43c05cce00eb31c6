"""Decoders against Pillow used directly, and resizing against Pillow's."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from beit_fast.data import resizing
from beit_fast.data.decoding import DaliDecoder, DaliPipeline, PilDecoder
from beit_fast.data.screening import Header, Rejection, screen


def pillow(data):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I;16"):
        gray = np.round(np.asarray(image) / 257).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


HEADERS = [Header("jpeg", 120, 160)] * 3


def whole(data):
    header = screen(data)
    return (0, 0, header.height, header.width)


@pytest.mark.parametrize("decoder", [PilDecoder(), DaliDecoder(2)], ids=["pil", "dali"])
def test_good_files_decode_as_pillow_does(decoder, good_files):
    windows = np.array([whole(data) for data in good_files.values()], np.int32)
    crops = decoder.decode(list(good_files.values()), [screen(data) for data in good_files.values()], windows)
    for (kind, data), crop in zip(good_files.items(), crops, strict=True):
        assert crop.dtype == np.uint8
        assert crop.shape == (*whole(data)[2:], 3), kind
        levels = np.abs(crop.astype(int) - pillow(data)).max()
        assert levels <= (1 if "16_bit" in kind else 0), kind


@pytest.mark.parametrize("decoder", [PilDecoder(), DaliDecoder(2)], ids=["pil", "dali"])
def test_a_window_is_that_part_of_the_whole(decoder, good_files):
    rng = np.random.default_rng(0)
    windows = []
    for data in good_files.values():
        height, width = whole(data)[2:]
        top, left = int(rng.integers(height)), int(rng.integers(width))
        windows.append((top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))))
    headers = [screen(data) for data in good_files.values()]
    crops = decoder.decode(list(good_files.values()), headers, np.array(windows, np.int32))
    for (kind, data), crop, (top, left, height, width) in zip(good_files.items(), crops, windows, strict=True):
        part = pillow(data)[top : top + height, left : left + width].astype(int)
        assert np.abs(crop - part).max() <= (1 if "16_bit" in kind else 0), kind


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("decoder", [PilDecoder(), DaliDecoder(2)], ids=["pil", "dali"])
def test_damaged_images_are_singled_out(decoder, good_files, damaged_files, broken_files):
    """Also those that the screening refuses first: a decoder meets them if the screening is wrong one day."""
    jpeg = good_files["jpeg"]
    for kind, data in {**damaged_files, **broken_files}.items():
        crops = decoder.decode([jpeg, data, jpeg], HEADERS, np.array([(0, 0, 110, 150)] * 3, np.int32))
        assert np.array_equal(crops[0], pillow(jpeg)[:110, :150]), kind
        assert np.array_equal(crops[2], crops[0])
        if kind in damaged_files or kind in ("empty", "web_page", "random_bytes", "jpeg_of_100_bytes"):
            assert isinstance(crops[1], Rejection), kind
    assert all(
        isinstance(crop, Rejection) for crop in decoder.decode([b"a", b"b"], HEADERS[:2], np.ones((2, 4), np.int32))
    )


def test_flipped_bytes_never_end_a_batch(good_files):
    rng = np.random.default_rng(0)
    decoder = DaliDecoder(1)
    jpeg = good_files["jpeg"]
    for _ in range(20):
        content = bytearray(jpeg)
        for place in rng.integers(700, len(content) - 2, 200):
            content[place] = int(rng.integers(256))
        crops = decoder.decode([jpeg, bytes(content)], HEADERS[:2], np.array([(0, 0, 120, 160)] * 2, np.int32))
        assert np.array_equal(crops[0], pillow(jpeg))


@pytest.mark.parametrize("lanczos_in_torch", [True, False])
def test_resizing_is_close_to_pillow(good_files, monkeypatch, lanczos_in_torch):
    if lanczos_in_torch and not resizing.has_uint8_lanczos():
        pytest.skip("this torch has no Lanczos filter for bytes")
    monkeypatch.setattr(resizing, "has_uint8_lanczos", lambda: lanczos_in_torch)
    rng = np.random.default_rng(0)
    photograph = pillow(good_files["jpeg_444"])
    for mode, size, filter_ in (
        ("bicubic", 224, Image.Resampling.BICUBIC),
        ("bicubic", 48, Image.Resampling.BICUBIC),
        ("lanczos", 112, Image.Resampling.LANCZOS),
        ("lanczos", 24, Image.Resampling.LANCZOS),
    ):
        for _ in range(6):
            height, width = int(rng.integers(20, 120)), int(rng.integers(20, 160))
            crop = photograph[:height, :width]  # not contiguous
            out = resizing.resize(crop, (size, size), mode)
            expected = np.asarray(Image.fromarray(crop).resize((size, size), filter_)).astype(int)
            levels = np.abs(out.numpy() - expected)
            assert levels.mean() < 0.3
            assert levels.max() <= 16


def test_resizing_extreme_crops():
    for shape in ((1, 1), (1, 300), (2, 3000), (300, 1)):
        crop = np.full((*shape, 3), 77, np.uint8)
        for mode in ("bicubic", "lanczos"):
            assert (resizing.resize(crop, (32, 32), mode) == 77).all()


def test_on_a_gpu_outputs_are_asked_for_in_the_order_of_the_current_stream(monkeypatch):
    """Without a stream DALI would wait for the device before it returns; on the CPU there is none."""
    asked = []

    class Pipeline:
        def feed_input(self, name, data):
            pass

        def run(self, *streams):
            asked.append(streams)
            return ()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    for device in (1, None):
        pipeline = DaliPipeline(1, device_id=device)
        pipeline._pipe, pipeline._capacity = Pipeline(), 1
        assert pipeline.run([b"x"], np.zeros((1, 4), np.int32)) == ()
    assert asked == [("stream of 1",), ()]
