"""What label maps hold is said before the training: absent classes, ignored pixels, nothing to learn from."""

import os

import numpy as np
import pytest
from PIL import Image

from beit_fast.data.loader import Request
from beit_fast.data.segmentation import open_segmentation
from beit_fast.data.segmentation_loader import SegmentationCropSampler, SegmentationLoader


def masks(root, *arrays, classes=2):
    """An opened data set of images of 12 x 12 pixels with these label maps."""
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    for number, values in enumerate(arrays):
        Image.new("RGB", (12, 12)).save(root / f"images/{number}.jpg")
        Image.fromarray(np.asarray(values, np.uint8)).save(root / f"annotations/{number}.png")
    return open_segmentation(root, True, classes, False, 255)


def stripes(*values):
    return np.repeat(np.resize(values, 12)[:, None], 12, axis=1)


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        (
            (0, 255),
            2,
            r"1 of 2 classes without a pixel \(1\): .*masks of 0 and 255 need their second class written as 1",
        ),
        ((255,), 2, r"100\.0 % of the pixels ignored"),
        ((1,), 150, r"149 of 150 classes without a pixel \(0, 2, 3, 4, 5, 6, 7, 8, \.\.\.\)"),
        ((0, 1, *[255] * 22), 2, r"91\.7 % of the pixels ignored"),
    ],
)
def test_labels_that_nothing_can_be_learnt_from_are_refused(tmp_path, values, classes, message):
    maps = [stripes(*np.roll(values, 12 * turn)) for turn in range(4)]
    with pytest.raises(ValueError, match=message):
        masks(tmp_path, *maps, classes=classes).check_labels(0)


def test_absent_classes_and_ignored_pixels_are_noted(tmp_path):
    data = masks(tmp_path, *[stripes(0, 2, 255, 2)] * 5, classes=4)
    counts = data.check_labels(0)
    assert counts.pixels.tolist() == [5 * 36, 5 * 36, 0, 5 * 72, 0]
    assert data.source.contents.notes == [
        "5 label maps: 25.0 % of the pixels ignored; 2 of 4 classes without a pixel (1, 3)"
    ]


def test_a_sample_of_the_labels_is_drawn_by_the_seed(tmp_path):
    data = masks(tmp_path, *[stripes(0, 1, *[255] * k) for k in range(8)])
    counts = [data.check_labels(seed, count=3).pixels.tolist() for seed in (0, 0, 1, 2)]
    assert counts[0] == counts[1]
    assert len({tuple(c) for c in counts}) > 1


def test_the_first_epoch_counts_all_labels(tmp_path):
    """Not those of the second, which is read ahead; what is printed of them: `test_two_processes.py`."""
    data = masks(tmp_path, *[stripes(0, 2, 255, 2)] * 5, classes=4)
    options = {"seed": 0, "mean": (0, 0, 0), "std": (1, 1, 1), "threads": 2, "decoder": "pil"}
    with SegmentationLoader(data, SegmentationCropSampler(crop=8, base=(12, 12)), None, **options) as loader:
        list(loader.batches(Request(epoch, part) for epoch in (3, 4) for part in np.split(np.arange(4), 2)))
        assert loader.first_epoch == 3
        assert loader.label_counts.maps == 4
        assert loader.label_counts.pixels.tolist() == [4 * 36, 4 * 36, 0, 4 * 72, 0]


def test_two_label_files_of_one_image_are_refused(tmp_path):
    masks(tmp_path, stripes(0, 1))
    Image.fromarray(np.zeros((12, 12), np.uint8)).save(tmp_path / "annotations/0.tif")
    with pytest.raises(ValueError, match=r"two label files for 0: 0\.png and 0\.tif"):
        open_segmentation(tmp_path, True, 2, False, 255)


def test_names_of_classes_that_are_no_utf8_come_back(tmp_path):
    masks(tmp_path, stripes(0, 1))
    (tmp_path / "classes.txt").write_bytes("Straße\n".encode("latin1") + "狗\n".encode("gbk"))
    names = open_segmentation(tmp_path, True, None, False, 255).classes
    assert [os.fsencode(name) for name in names] == ["Straße".encode("latin1"), "狗".encode("gbk")]
