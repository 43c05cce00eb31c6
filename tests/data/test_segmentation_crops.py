"""Where crops of segmentation lie, how large they become, and what a crop holds: by hand, from given random numbers."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.data import segmentation_loader
from beit_fast.data.loader import Request
from beit_fast.data.segmentation import IGNORE, LabelRule, SegmentationImages
from beit_fast.data.segmentation_loader import (
    SegmentationCropSampler,
    SegmentationLoader,
    WholeImages,
    nearest,
    normalised,
    scaled_size,
)
from beit_fast.data.sources import ArraySource


def drawn(monkeypatch, sampler, label, *numbers):
    """The placement where these random numbers are drawn: for the scale, the flip, and the corners of the tries."""
    enough = np.array([[*numbers, *[0.0] * 40]])
    monkeypatch.setattr(segmentation_loader, "uniforms", lambda keys, count, stream: enough[:, :count])
    return sampler.sample(0, label)


def plain(height, width):
    return np.zeros((height, width), np.int64)


@pytest.mark.parametrize(
    ("shape", "crop", "numbers", "expected"),
    [
        # 60 x 100 at factor 1.25 fits into 250 x 125 as 125 x 208; of that 100 x 100, which are 48 x 48 of the source.
        ((60, 100), 100, (0.5, 0.9, 0.5, 0.25), ((6, 13, 48, 48), (100, 100), False)),
        ((60, 100), 100, (0.5, 0.4, 0.0, 0.999), ((0, 52, 48, 48), (100, 100), True)),
        ((60, 100), 100, (0.5, 0.5, 0.999, 0.0), ((12, 0, 48, 48), (100, 100), False)),
        # Upright, at 0.5: into 100 x 50 as 83 x 50; all of its width.
        ((100, 60), 64, (0.0, 0.0, 0.5, 0.7), ((12, 0, 77, 60), (64, 50), True)),
        # At 2 a pixel becomes six and a half or so; a crop of one pixel is one pixel of the source.
        ((8, 16), 1, (0.999999, 1.0, 0.999, 0.5), ((7, 8, 1, 1), (1, 1), False)),
        # The crop holds all of the image at 0.8.
        ((60, 100), 512, (0.2, 0.2, 0.3, 0.3), ((0, 0, 60, 100), (80, 133), True)),
    ],
)
def test_the_place_of_a_crop_by_hand(monkeypatch, shape, crop, numbers, expected):
    sampler = SegmentationCropSampler(crop=crop, base=(200, 100), cat_max_ratio=1.0)
    assert drawn(monkeypatch, sampler, plain(*shape), *numbers) == expected


def test_a_window_never_leaves_the_image(monkeypatch):
    """3 x 3 becomes 4 x 4, of which a crop has two: 1.5 of the source, rounded to 2, from 1.5, rounded to 2, on."""
    sampler = SegmentationCropSampler(crop=2, base=(4, 4), ratio=(1.0, 1.0), cat_max_ratio=1.0)
    placement = drawn(monkeypatch, sampler, plain(3, 3), 0.0, 0.9, 0.9, 0.9)
    assert placement == ((1, 1, 2, 2), (2, 2), False)


@pytest.mark.parametrize("mixed", [0, 3, 9, 10, None])
@pytest.mark.parametrize(("down", "across"), [(0, 7), (7, 0)])
def test_a_crop_is_drawn_eleven_times_at_the_most(monkeypatch, mixed, down, across):
    """The nth try begins at pixel n + down, n + across; the labels of two corners are both in the mixed one alone."""
    corners = [value for n in range(11) for value in ((n + down + 0.5) / 26, (n + across + 0.5) / 26)]
    label = np.full((30, 30), IGNORE)
    if mixed is not None:
        label[mixed + down, mixed + across + 4], label[mixed + down + 4, mixed + across] = 0, 1
    for limit, expected in ((0.75, 10 if mixed is None else mixed), (1.0, 0)):  # 1 takes any
        sampler = SegmentationCropSampler(crop=5, base=(30, 30), ratio=(1.0, 1.0), cat_max_ratio=limit)
        window = drawn(monkeypatch, sampler, label, 0.0, 0.9, *corners).window
        assert window == (expected + down, expected + across, 5, 5)


@pytest.mark.parametrize(
    ("values", "is_mixed"),
    [
        ([0, 0, 0, 1], False),  # three quarters are too much
        ([0, 0, 1, 1], True), ([0, 1, 2, 2], True), ([2, 2, 2, 2], False),
        ([IGNORE, IGNORE, IGNORE, 1], False), ([IGNORE, IGNORE, 0, 1], True), ([IGNORE] * 4, False),
        ([IGNORE, 0, 0, 0, 0, 1, 1, 1], True), ([IGNORE, IGNORE, 3, 3, 3, 1], False),
    ],
)  # fmt: skip
def test_which_crops_are_mixed(values, is_mixed):
    """By mmsegmentation's rule: two classes, the larger below three quarters of what counts."""
    assert SegmentationCropSampler()._is_mixed(np.array([values])) == is_mixed


def test_crops_of_a_key_stay_the_same():
    """A run that goes on under a later version has the same crops."""
    sampler = SegmentationCropSampler(crop=32, base=(96, 64))
    found = [sampler.sample(key, plain(60, 90)) for key in (0, 1, -5)]
    assert found == [
        ((37, 19, 20, 19), (32, 32), True), ((6, 31, 46, 46), (32, 32), True), ((0, 41, 49, 49), (32, 32), True)
    ]  # fmt: skip


def test_an_image_has_at_least_one_pixel():
    assert scaled_size(1, 1000, (10, 10)) == (1, 10)
    assert scaled_size(1000, 1, (10, 10)) == (10, 1)
    assert scaled_size(3, 7, (float("inf"), 5)) == (5, 12)  # 11.67
    assert scaled_size(7, 3, (float("inf"), 5)) == (12, 5)
    assert scaled_size(100, 101, (50.4, 50.4)) == (50, 50)  # 49.9 and 50.4


def test_the_defaults_are_those_of_ade20k():
    sampler = SegmentationCropSampler()
    values = (512, (2048, 512), (0.5, 2.0), 0.75, 0.5)
    assert dataclasses.astuple(sampler) == values
    assert hash(sampler) == hash(SegmentationCropSampler(*values))
    for frozen, field in ((sampler, "crop"), (batch_of(1), "images")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, field, 3)


@pytest.mark.parametrize(
    ("values", "sound"),
    [
        ({"crop": 1}, True), ({"crop": 0}, False), ({"base": (1, 4)}, True), ({"base": (4, 0)}, False),
        ({"ratio": (0.1, 0.1)}, True), ({"ratio": (0.0, 1.0)}, False), ({"ratio": (0.6, 0.5)}, False),
        ({"ratio": (-0.5, 1.0)}, False), ({"ratio": (2.0, 3.0)}, True),
        ({"cat_max_ratio": 1.0}, True), ({"cat_max_ratio": 0.01}, True), ({"cat_max_ratio": 0.0}, False),
        ({"cat_max_ratio": -0.5}, False), ({"cat_max_ratio": 1.01}, False),
        ({"flip_probability": 0.0}, True), ({"flip_probability": 1.0}, True), ({"flip_probability": -0.1}, False),
        ({"flip_probability": 1.1}, False),
    ],
)  # fmt: skip
def test_what_a_sampler_takes(values, sound):
    if sound:
        SegmentationCropSampler(**values)
        return
    with pytest.raises(ValueError, match="crops: "):
        SegmentationCropSampler(**values)


def test_nearest_is_the_pixel_of_the_centre():
    row = np.arange(7)[None]
    assert nearest(row, (1, 3)).tolist() == [[1, 3, 5]]  # centres 1.17, 3.5, 5.83
    assert nearest(row, (2, 2)).tolist() == [[1, 5]] * 2
    assert nearest(row[:, :2].T, (5, 1)).ravel().tolist() == [0, 0, 1, 1, 1]  # 0.2, 0.6, 1.0, 1.4, 1.8


def test_normalisation_by_hand():
    levels = torch.tensor([0.0, 255.0, 102.0]).view(3, 1, 1)
    found = normalised(levels, (0.5, 0.25, 0.4), (0.5, 0.5, 0.1)).ravel()
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.5, 0.0]))


def data_of(folder, count, size=(6, 8)):
    """Images of one red, green and blue each, with label 1 on the left and 0 on the right."""
    label = np.repeat([[1] * 3 + [0] * (size[1] - 3)], size[0], 0).astype(np.uint8)
    Image.fromarray(label).save(folder / "label.png")
    pictures = [np.full((*size, 3), (255, 51, 0), np.uint8) for _ in range(count)]
    return SegmentationImages(ArraySource(pictures), (folder / "label.png",) * count, LabelRule(2), ("a", "b"))


def batch_of(count, **fields):
    empty = torch.zeros(count)
    return segmentation_loader.SegmentationBatch(empty, empty, empty, empty, **fields)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_what_a_batch_holds(tmp_path, flip):
    """6 x 8 pixels in a crop of 10: each value, each label, and the padding below and to the right."""
    sampler = SegmentationCropSampler(crop=10, base=(8, 6), ratio=(1.0, 1.0), flip_probability=flip)
    with SegmentationLoader(
        data=data_of(tmp_path, 3), sampler=sampler, photometric=None, seed=0, mean=(0.2, 0.2, 0.2), std=(0.1, 0.2, 0.4),
        threads=1, decoder="pil",
    ) as loader:  # fmt: skip
        assert loader.prefetch == 2
        (batch,) = loader.batches([Request(0, np.arange(3))])
    assert len(batch) == 3
    images = torch.zeros(3, 3, 10, 10)
    images[:, :, :6, :8] = torch.tensor([8.0, 0.0, -0.5])[:, None, None]
    torch.testing.assert_close(batch.images, images)
    labels = torch.full((3, 10, 10), IGNORE)
    labels[:, :6, :8] = torch.tensor([0] * 5 + [1] * 3 if flip else [1] * 3 + [0] * 5)
    assert torch.equal(batch.labels, labels)
    assert batch.sample_keys.unique().numel() == 3


def test_label_maps_are_counted_once(tmp_path):
    """Those of the epoch that is the first one here; with the whole map, whatever the crop."""
    with SegmentationLoader(
        data_of(tmp_path, 3), SegmentationCropSampler(crop=4, base=(8, 6)), None, seed=0, mean=(0,) * 3, std=(1,) * 3,
        decoder="pil", threads=1,
    ) as loader:  # fmt: skip
        assert (loader.label_counts.pixels.tolist(), loader.label_counts.maps) == ([0, 0, 0], 0)
        list(loader.batches([Request(7, np.arange(2)), Request(8, np.arange(3))]))
        assert (loader.label_counts.pixels.tolist(), loader.label_counts.maps) == ([0, 60, 36], 2)


def test_every_whole_image_comes_once(tmp_path):
    """By two threads: batches of two, and one that is alone; the middle one's label is lost."""
    data = data_of(tmp_path, 5)
    lost = dataclasses.replace(data, labels=(*data.labels[:2], tmp_path / "lost.png", *data.labels[3:]))
    with WholeImages(data=lost, threads=2, decoder="pil") as loader:
        loader.bad_images.max_share = 1.0
        assert loader.prefetch == 2
        found = list(loader.images())
    assert [image.number for image in found] == [0, 1, 3, 4]
    for image in found:
        assert torch.equal(image.pixels, torch.tensor([255, 51, 0], dtype=torch.uint8).expand(6, 8, 3))
        assert image.label.tolist() == [[1] * 3 + [0] * 5] * 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        found[0].number = 3


@pytest.mark.parametrize(
    ("size", "expected"),
    [((512, 683), (512, 683)), ((256, 512), (512, 1024)), ((300, 2000), (307, 2048)), ((683, 512), (683, 512))],
)
def test_an_image_fits_into_both_sides(size, expected):
    assert scaled_size(*size, (2048, 512)) == expected


def test_crops_are_mixed_where_they_can_be():
    """A label map that is one class but for a corner: most crops are drawn again, those of one class never pass."""
    label = np.zeros((64, 64), np.int64)
    label[:24, :24] = 1
    shares = {}
    for limit in (1.0, 0.75):
        sampling = SegmentationCropSampler(crop=16, base=(64, 64), ratio=(1.0, 1.0), cat_max_ratio=limit)
        windows = [sampling.sample(key, label).window for key in range(400)]
        assert all(h == w == 16 and 0 <= t <= 48 and 0 <= l <= 48 for t, l, h, w in windows)
        counts = [np.bincount(label[t : t + h, l : l + w].ravel(), minlength=2) for t, l, h, w in windows]
        shares[limit] = np.mean([c.max() < 0.75 * c.sum() for c in counts])
    assert shares[1.0] < 0.2
    assert shares[0.75] > 4 * shares[1.0]
    ignored = np.where(label == 0, IGNORE, label)
    assert not SegmentationCropSampler()._is_mixed(ignored)  # what is ignored is no second class


def test_scales_are_uniform_and_windows_cover_the_image():
    label = np.zeros((96, 128), np.int64)
    sampling = SegmentationCropSampler(crop=48, base=(384, 96), ratio=(0.5, 2.0), cat_max_ratio=1.0)
    placements = [sampling.sample(key, label) for key in range(3000)]
    scales = np.array([p.size[0] / p.window[2] for p in placements])
    assert abs(scales.mean() - 1.25) < 0.02
    assert scales.min() < 0.52
    assert scales.max() > 1.95
    assert abs(np.mean([p.flip for p in placements]) - 0.5) < 0.03
    seen = np.zeros(label.shape, bool)
    for top, left, height, width in (p.window for p in placements):
        seen[top : top + height, left : left + width] = True
    assert seen.all()
