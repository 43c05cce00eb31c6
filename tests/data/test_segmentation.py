"""Label files, paired crops, distortion: against Pillow, colorsys and each other."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.data import scenes
from beit_fast.data.augmentation.photometric import PhotometricDistortion, distort
from beit_fast.data.builtin import render_labelled
from beit_fast.data.loader import Request
from beit_fast.data.resizing import resize
from beit_fast.data.screening import BadImages, Header, Rejection
from beit_fast.data.segmentation import (
    IGNORE,
    LabelRule,
    SegmentationImages,
    builtin_segmentation,
    open_segmentation,
    read_numbers,
)
from beit_fast.data.segmentation_loader import (
    SegmentationCropSampler,
    SegmentationLoader,
    WholeImages,
    nearest,
    scaled_size,
)
from beit_fast.data.sources import ArraySource, open_source

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SIZES = [(60, 90), (90, 60), (77, 77), (50, 123), (64, 64), (131, 52)]


def number_picture(height, width, seed=0):
    """Every pixel its own number below 2 ** 16, smooth so that resizing keeps it: red the row, green the column."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.zeros_like(x)], -1).astype(np.uint8), (y * 256 + x).astype(np.int64)


@pytest.fixture
def pairs(tmp_path):
    """Pictures whose pixels say where they are, with labels that say the same."""
    pictures, paths = [], []
    for number, (height, width) in enumerate(SIZES):
        picture, label = number_picture(height, width)
        pictures.append(picture)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(label.astype(np.uint16)).save(paths[-1])
    rule = LabelRule(num_classes=2**16 - 1, ignore_value=2**16 - 1)
    return SegmentationImages(ArraySource(pictures), tuple(paths), rule, ())


def views_of(data, sampling, photometric=None, **options):
    return SegmentationLoader(data, sampling, photometric, **({"seed": 1, "threads": 1} | HALF | options))


def collect(views, *requests):
    batches = list(views.batches(requests))
    views.close()
    return batches


def disagreement(images, labels):
    """Mean distance, in source pixels, between where the image and where the labels say that a crop's pixels are."""
    levels = (images + 1) * 127.5
    counted = labels >= 0
    rows, columns = labels // 256, labels % 256
    distance = torch.maximum((levels[:, 0] - rows).abs(), (levels[:, 1] - columns).abs())
    return float(distance[counted].mean()), counted


@pytest.mark.parametrize("decoder", ["dali", "pil"])
def test_image_and_label_have_one_geometry(pairs, decoder):
    """The pixels of a crop and its labels say the same place, to rounding and half a pixel where it shrinks."""
    sampling = SegmentationCropSampler(crop=32, base=(128, 48), ratio=(0.7, 1.6), cat_max_ratio=1.0)
    batches = collect(views_of(pairs, sampling, decoder=decoder), *(Request(e, np.arange(6)) for e in range(4)))
    images, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels"))
    distance, counted = disagreement(images, labels)
    assert distance < 0.6
    assert counted.float().mean() > 0.8
    falling = labels[:, 5, 6] % 256 > labels[:, 5, 9] % 256  # flipped crops run backwards
    assert 0 < falling.sum() < len(labels)


@pytest.mark.parametrize(("rows", "columns"), [(1, 0), (0, 1), (-1, 0), (0, -1)])
def test_a_label_shifted_by_one_pixel_is_caught(pairs, rows, columns):
    """The test above would see it: at scale 1 the two agree exactly, and a shift is a distance of one."""
    sampling = SegmentationCropSampler(
        crop=32, base=(512, 512), ratio=(1.0, 1.0), cat_max_ratio=1.0, flip_probability=0.5
    )
    square = SegmentationImages(
        ArraySource([number_picture(512, 512)[0]]), (pairs.labels[0].with_name("square.png"),), pairs.rule, ()
    )
    picture, label = number_picture(200, 200)
    tile = np.zeros((512, 512, 3), np.uint8)
    tile[:200, :200] = picture
    numbers = np.full((512, 512), 2**16 - 1, np.uint16)
    numbers[:200, :200] = label
    square = SegmentationImages(ArraySource([tile]), square.labels, square.rule, ())
    found = []
    for shift in ((0, 0), (rows, columns)):
        Image.fromarray(np.roll(numbers, shift, (0, 1))).save(square.labels[0])
        batches = collect(views_of(square, sampling), *(Request(e, np.arange(1)) for e in range(12)))
        images, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("images", "labels"))
        inside = (labels % 256 < 198) & (labels // 256 < 198) & (labels % 256 > 1) & (labels // 256 > 1)
        found.append(disagreement(images, torch.where(inside, labels, -1))[0])
    assert found[0] < 0.01
    assert found[1] > 0.99


def test_padding_is_zero_and_ignored(pairs):
    sampling = SegmentationCropSampler(
        crop=64, base=(64, 32), ratio=(1.0, 1.0), cat_max_ratio=1.0, flip_probability=1.0
    )
    batch = collect(views_of(pairs, sampling), Request(0, np.arange(6)))[0]
    for row, index in enumerate(batch.indices.tolist()):
        height, width = scaled_size(*SIZES[index], (64, 32))
        height, width = min(height, 64), min(width, 64)
        assert (batch.labels[row, :height, :width] >= 0).all()
        assert (batch.labels[row, height:] == IGNORE).all()
        assert (batch.labels[row, :, width:] == IGNORE).all()
        assert batch.images[row, :, height:].abs().sum() + batch.images[row, :, :, width:].abs().sum() == 0


def test_the_split_into_batches_does_not_matter(tmp_path):
    data = builtin_segmentation(tmp_path, 8, 48, train=True)
    sampling = SegmentationCropSampler(crop=32, base=(48, 48), ratio=(0.5, 2.0))

    def run(requests, **options):
        return collect(views_of(data, sampling, PhotometricDistortion(), **options), *requests)

    whole = run([Request(3, np.arange(8))])[0]
    parts = run([Request(3, p) for p in np.split(np.arange(8), [3, 4])], threads=2, prefetch=1)
    for name in ("images", "labels", "sample_keys", "indices"):
        expected, found = getattr(whole, name), torch.cat([getattr(p, name) for p in parts])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if name == "images" else 0, msg=name)
    later = run([Request(4, np.arange(8))])[0]
    order = later.indices.argsort()
    assert (later.labels[order] != whole.labels[whole.indices.argsort()]).float().mean() > 0.1


def test_resizing_is_pillows():
    picture = render_labelled(0, 0, 90)[0][:70]
    for size in ((40, 50), (140, 180), (70, 90)):
        expected = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR)).astype(float)
        found = resize(picture, size, "bilinear").numpy()
        assert abs(found - expected).mean() < 0.3
        label = picture[..., 0].astype(np.int64)
        pillow = Image.fromarray(picture[..., 0]).resize(size[::-1], Image.Resampling.NEAREST)
        np.testing.assert_array_equal(nearest(label, size), np.asarray(pillow))


def test_distortion_is_colorsys():
    """A pixel at a time, in Python's own HSV."""
    keys = np.arange(40, dtype=np.int64) * 7919
    plan = PhotometricDistortion().sample(keys)
    levels = np.random.default_rng(0).uniform(0, 255, (40, 3, 4, 3)).astype(np.float32)
    levels[:, :, 0, 0] = 80.0  # gray has no hue
    levels[:, :, 0, 1] = 0.0
    expected = np.empty_like(levels)
    for b in range(40):
        added, before, saturation, degrees, after = plan[b].astype(float)
        for y in range(4):
            for x in range(3):
                pixel = np.clip(np.clip(levels[b, :, y, x] + added, 0, 255) * before, 0, 255) / 255
                h, s, v = colorsys.rgb_to_hsv(*pixel)
                pixel = np.array(colorsys.hsv_to_rgb((h + degrees / 360) % 1, min(s * saturation, 1), v))
                expected[b, :, y, x] = np.clip(pixel * 255 * after, 0, 255)
    found = distort(torch.from_numpy(levels), plan).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert abs(found - levels).mean() > 5


def test_the_plan_has_mmsegmentations_frequencies():
    plan = PhotometricDistortion().sample(np.random.default_rng(0).integers(-(2**62), 2**62, 20_000))
    neutral = np.array([0, 1, 1, 0, 1], np.float32)
    share = (plan != neutral).mean(0)
    np.testing.assert_allclose(share, [0.5, 0.25, 0.5, 0.5 * 35 / 36, 0.25], atol=0.012)
    assert not ((plan[:, 1] != 1) & (plan[:, 4] != 1)).any()
    assert np.abs(plan[:, 0]).max() <= 32
    assert set(np.unique(plan[:, 3])) == set(range(-36, 36, 2))
    factors = plan[:, 2][plan[:, 2] != 1]
    assert abs(factors.mean() - 1) < 0.01
    assert factors.min() < 0.51
    assert factors.max() > 1.49


def test_palettes_and_16_bits_are_read_by_index(tmp_path):
    numbers = np.arange(12).reshape(3, 4).astype(np.uint8)
    palette = Image.fromarray(numbers, mode="P")
    palette.putpalette(list(np.random.default_rng(0).integers(0, 256, 768)))
    palette.save(tmp_path / "palette.png")
    Image.fromarray(numbers).save(tmp_path / "gray.png")
    Image.fromarray(numbers.astype(np.uint16) * 300).save(tmp_path / "deep.png")
    Image.fromarray(numbers.astype(np.uint16) * 300).save(tmp_path / "deep.tif")
    Image.fromarray(numbers > 5).save(tmp_path / "bits.png")
    for name, expected in (("palette.png", numbers), ("gray.png", numbers), ("deep.png", numbers.astype(int) * 300),
                           ("deep.tif", numbers.astype(int) * 300), ("bits.png", numbers > 5)):  # fmt: skip
        np.testing.assert_array_equal(read_numbers((tmp_path / name).read_bytes(), name), expected)
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match=r"colour.png: a picture of mode RGB; a label file has one number per pixel"):
        read_numbers((tmp_path / "colour.png").read_bytes(), "colour.png")
    with pytest.raises(OSError, match="no picture"):
        read_numbers(b"nothing", "x")


def test_zero_is_reduced_as_in_ade20k():
    numbers = np.array([[0, 1, 150, 255]], np.uint8)
    assert LabelRule(150, reduce_zero=True).apply(numbers, "x").tolist() == [[IGNORE, 0, 149, IGNORE]]
    assert LabelRule(151).apply(numbers, "x").tolist() == [[0, 1, 150, IGNORE]]
    with pytest.raises(ValueError, match=r"x: label 150 at row 0, column 2 is none of the 150 classes, .* 0 to 149"):
        LabelRule(150).apply(numbers, "x")
    with pytest.raises(ValueError, match=r"label 151 at row 0, column 0 is none .* 1 to 150 \(255: ignored\)"):
        LabelRule(150, reduce_zero=True).apply(np.array([[151]], np.uint8), "x")
    deep = np.array([[255, 299, 65535]], np.uint16)
    assert LabelRule(300, ignore_value=65535).apply(deep, "x").tolist() == [[255, 299, IGNORE]]


def write(root, images, labels, count, size=(20, 30)):
    """Pictures under `images` and labels under `labels` of a root."""
    for number in range(count):
        for folder, suffix, picture in ((images, "jpg", np.full((*size, 3), 90, np.uint8)),
                                        (labels, "png", np.full(size, number % 3, np.uint8))):  # fmt: skip
            path = root / folder / f"sub{number % 2}" / f"a.{number}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)


def opened(root, train=True, classes=3):
    return open_segmentation(root, train, classes, False, 255)


@pytest.mark.parametrize(
    ("training", "validation"),
    [
        (("images/training", "annotations/training"), ("images/validation", "annotations/validation")),
        (("images/train", "labels/train"), ("images/val", "labels/val")),
        (("train/images", "train/masks"), ("val/images", "val/masks")),
    ],
)
def test_layouts_of_folders(tmp_path, training, validation):
    write(tmp_path, *training, 5)
    write(tmp_path, *validation, 2)
    assert len(opened(tmp_path)) == 5
    found = opened(tmp_path, train=False)
    assert len(found) == 2
    for index in range(2):
        assert found.labels[index].stem == open_source(tmp_path / validation[0]).name(index).split("/")[-1][:-4]
        label = found.read_label(index, Header("jpeg", 20, 30))
        assert set(np.unique(label)) == {int(found.labels[index].stem.split(".")[1]) % 3}


def test_a_plain_pair_of_folders(tmp_path):
    write(tmp_path, "images", "labels", 4)
    assert len(opened(tmp_path)) == len(opened(tmp_path, train=False)) == 4
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\n")
    assert opened(tmp_path, classes=None).classes == ("sky", "sea", "land")
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tbuilding, edifice\n3\tsky\n")
    assert opened(tmp_path, classes=None).classes == ("wall", "building", "sky")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, "no training images with labels; looking for images/training"),
        (lambda root: write(root, "images/validation", "annotations/validation", 2), "no training images"),
        (lambda root: (write(root, "images", "labels", 4), (root / "labels/sub1/a.3.png").unlink()),
         r"1 of 4 images have no label, e.g. .*a\.3\.jpg \(sub1/a\.3\.png is missing\)"),
        (lambda root: (write(root, "images", "labels", 1), (root / "classes.txt").write_text("a\nb\n")),
         "2 names of classes, but --data.num-classes is 3"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)


def test_unknown_classes_are_asked_for(tmp_path):
    write(tmp_path, "images", "labels", 1)
    with pytest.raises(ValueError, match=r"number of classes is unknown; give --data.num-classes"):
        opened(tmp_path, classes=None)
    with pytest.raises(ValueError, match="no such folder"):
        opened(tmp_path / "nowhere")


def test_labels_that_do_not_fit_end_the_run(tmp_path):
    write(tmp_path, "images", "labels", 2)
    data = opened(tmp_path)
    sampling = SegmentationCropSampler(crop=16, base=(32, 16))
    Image.fromarray(np.zeros((20, 31), np.uint8)).save(data.labels[0])
    with pytest.raises(ValueError, match=r"the label is 31 x 20 pixels, its image .* 30 x 20; both have to be"):
        collect(views_of(data, sampling), Request(0, np.arange(2)))
    Image.fromarray(np.full((20, 30), 7, np.uint8)).save(data.labels[0])
    with pytest.raises(ValueError, match=r"label 7 at row 0, column 0 is none of the 3 classes"):
        collect(views_of(data, sampling), Request(0, np.arange(2)))
    whole = WholeImages(data, threads=1)
    with pytest.raises(ValueError, match="label 7"):
        list(whole.images())
    whole.close()


@pytest.mark.parametrize("decoder", ["dali", "pil"])
def test_bad_files_are_replaced_in_training_and_left_out_of_evaluation(tmp_path, decoder):
    write(tmp_path, "images", "labels", 6)
    data = opened(tmp_path)
    names = [data.source.name(index) for index in range(6)]
    with open(names[1], "r+b") as file:
        file.truncate(200)
    data.labels[4].write_bytes(data.labels[4].read_bytes()[:45])
    data.labels[5].unlink()
    bad = BadImages(6, max_share=1.0)
    views = views_of(data, SegmentationCropSampler(crop=16, base=(32, 16)), decoder=decoder, bad_images=bad)
    batch = collect(views, Request(0, np.arange(6)))[0]
    assert set(batch.indices.tolist()) == {0, 2, 3}
    assert set(bad.reasons) == {names[1], names[4], names[5]}
    assert "cannot be read" in bad.reasons[names[5]]
    whole = WholeImages(data, decoder=decoder, threads=2, bad_images=BadImages(6, max_share=1.0))
    assert [image.number for image in whole.images()] == [0, 2, 3]
    assert len(whole.bad_images) == 3
    whole.close()


def test_ranks_share_the_evaluation_without_repetition(tmp_path):
    data = builtin_segmentation(tmp_path, 7, 32, train=False)
    whole = WholeImages(data, threads=2)
    seen = [[image.number for image in whole.images(rank, 3)] for rank in range(3)]
    whole.close()
    assert seen == [[0, 3, 6], [1, 4], [2, 5]]


def test_scenes_come_with_their_label_maps(tmp_path):
    data = builtin_segmentation(tmp_path, 6, 64, train=True, seed=3)
    assert data.classes == scenes.SURFACES
    assert len(data.classes) >= 8
    for index in range(6):
        label = data.read_label(index, Header("jpeg", 64, 64))
        pixels, number = render_labelled(index, 3, 64)
        scene = scenes.render_scene(index, 3, 64)
        np.testing.assert_array_equal(label, scene.surfaces)
        np.testing.assert_array_equal(scene.pixels, pixels)
        assert (label == 7 + number % 4).mean() > 0.05  # the object, by its texture
        assert set(np.unique(label)) <= {*range(7), 7 + number % 4}


def test_label_maps_are_where_the_pixels_change():
    """Between the object and what lies under it the picture has an edge: its mean step is far above that elsewhere."""
    inside, across = [], []
    for index in range(20):
        scene = scenes.render_scene(index, 0, 96)
        steps = np.abs(np.diff(scene.pixels.astype(float).mean(2), axis=1))
        left, right = scene.surfaces[:, :-1], scene.surfaces[:, 1:]
        inside.append(steps[(left == right) & (left < 7)].mean())
        across.append(steps[left != right].mean())
    assert np.mean(across) > 5 * np.mean(inside)


def test_a_lost_label_map_is_drawn_again(tmp_path):
    data = builtin_segmentation(tmp_path, 3, 32, train=True)
    before = data.labels[1].read_bytes()
    data.labels[1].unlink()
    again = builtin_segmentation(tmp_path, 3, 32, train=True)
    assert again.labels[1].read_bytes() == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SegmentationCropSampler(crop=0), "needs positive crop"),
        (lambda: SegmentationCropSampler(ratio=(2.0, 0.5)), "needs positive crop, base and ratio"),
        (lambda: SegmentationCropSampler(cat_max_ratio=0), "cat_max_ratio must be in"),
        (lambda: PhotometricDistortion(contrast=1.5), "contrast and saturation in"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_label_is_a_rejection_where_it_cannot_be_read(pairs):
    pairs.labels[0].unlink()
    assert isinstance(pairs.read_label(0, Header("ppm", *SIZES[0])), Rejection)
