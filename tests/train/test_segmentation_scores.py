"""Segmentation scores: scikit-learn's, by hand, windows by brute force, every pixel and image once."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from beit_fast.data.segmentation import builtin_segmentation
from beit_fast.data.segmentation_loader import WholeImage, WholeImages, scaled_size
from beit_fast.models import BeitForSemanticSegmentation
from beit_fast.models.segmentation_windows import sliding_logits, window_starts
from beit_fast.train.distributed.world import World
from beit_fast.train.evaluation.segmentation import (
    Inference,
    SegmentationScores,
    confusion_matrix,
    evaluate_segmentation,
)
from beit_fast.train.tasks.segment import SegmentationModelConfig
from beit_fast.visualize.segmentations import side_by_side
from tests.train.summing_rank import Rank

CPU = World(0, 1, torch.device("cpu"))
MODEL = SegmentationModelConfig(
    size="tiny", width=24, depth=3, num_heads=2, image_size=32, patch_size=8, channels=8, auxiliary_channels=8
)
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# Scores.


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_scikit_learns(seed):
    """Random predictions, ignored pixels, a class that is nowhere and one that is only found."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    total = np.zeros((7, 7), np.int64)
    labels, found = rng.integers(0, 5, (6, 30, 20)), rng.integers(0, 6, (6, 30, 20))  # 5 only found, 6 nowhere
    found = np.where(rng.random(found.shape) < 0.4, labels, found)
    labels[rng.random(labels.shape) < 0.2] = -1
    for label, prediction in zip(labels, found, strict=True):  # an image at a time
        total += confusion_matrix(torch.from_numpy(label), torch.from_numpy(prediction), 7).numpy()
    counted = labels >= 0
    expected = metrics.confusion_matrix(labels[counted], found[counted], labels=range(7))
    np.testing.assert_array_equal(total, expected)
    scores = SegmentationScores(tuple("abcdefg"), total, 6).metrics()
    jaccard = metrics.jaccard_score(labels[counted], found[counted], labels=range(6), average=None, zero_division=0)
    recall = metrics.recall_score(labels[counted], found[counted], labels=range(5), average="macro")
    assert scores["mean_iou_percent"] == pytest.approx(100 * jaccard.mean())
    assert scores["mean_accuracy_percent"] == pytest.approx(100 * recall)
    accuracy = metrics.accuracy_score(labels[counted], found[counted])
    assert scores["pixel_accuracy_percent"] == pytest.approx(100 * accuracy)


def test_the_table_names_what_a_class_is_taken_for(tmp_path):
    confusion = np.array([[6, 2, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    scores = SegmentationScores(("ant", "bee", "cat", "dog"), confusion, 1)
    (table,) = scores.write(tmp_path)
    assert table.read_text().splitlines()[1:] == [
        "bee\t4\t0.00\t0.00\tcat (4)",
        "cat\t0\t0.00\t\t",
        "ant\t8\t75.00\t75.00\tbee (2)",
    ]
    assert scores.metrics()["mean_iou_percent"] == 25.0
    assert scores.metrics()["classes_without_a_pixel"] == 2


@pytest.mark.filterwarnings("error")
def test_every_number_by_hand(tmp_path):
    """Six pixels of ants, four found; one bee, found; three dogs taken for bees; cats nowhere; twelve ignored."""
    confusion = np.array([[4, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 3, 0, 0]])
    scores = SegmentationScores(("ant", "bee", "cat", "dog"), confusion, 3, ignored=12)
    assert scores.metrics() == {
        "mean_iou_percent": pytest.approx(100 * (4 / 6 + 1 / 5 + 0) / 3),
        "mean_accuracy_percent": pytest.approx(100 * (4 / 6 + 1 + 0) / 3),
        "pixel_accuracy_percent": 50.0,
        "validation_images": 3.0,
        "ignored_pixels_percent": pytest.approx(100 * 12 / 22),
        "classes_without_a_pixel": 1.0,
    }
    (table,) = scores.write(tmp_path)
    assert table == tmp_path / "per_class.tsv"
    assert table.read_text() == (
        "class\tpixels\tiou_percent\taccuracy_percent\tmost_often_taken_for\n"
        "dog\t3\t0.00\t0.00\tbee (3)\nbee\t1\t20.00\t100.00\t\nant\t6\t66.67\t66.67\tbee (1)\n"
    )


@pytest.mark.filterwarnings("error")
def test_classes_of_one_pixel_and_sets_of_one_class(tmp_path):
    pair = SegmentationScores(("ant", "bee"), np.array([[1, 0], [0, 0]]), 1)
    assert pair.iou[0] == pair.accuracy[0] == 1
    assert np.isnan([pair.iou[1], pair.accuracy[1]]).all()
    assert pair.metrics()["ignored_pixels_percent"] == 0
    (table,) = SegmentationScores(("all",), np.array([[9]]), 1).write(tmp_path)
    assert table.read_text().splitlines()[1:] == ["all\t9\t100.00\t100.00\t"]


def test_pictures_show_the_first_images(tmp_path):
    pixels = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    label, found = np.zeros((8, 6), np.int64), np.eye(8, 6, dtype=np.int64)
    examples = [(pixels, label, found)]
    written = SegmentationScores(("ant", "bee"), np.eye(2, dtype=np.int64), 1, examples=examples).write(tmp_path)
    assert written == [tmp_path / "per_class.tsv", tmp_path / "segmentations.png"]
    expected = np.asarray(side_by_side(examples, ("ant", "bee")))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "segmentations.png")), expected)


def test_pixels_are_counted_one_by_one():
    """Three images of different sizes with ignored pixels; the predictions are given."""
    rng = np.random.default_rng(0)
    sizes = [(4, 5), (3, 3), (2, 6)]
    labels = [rng.integers(-1, 2, size) for size in sizes]
    found = [rng.integers(0, 2, size) for size in sizes]
    pixels = [torch.full((*size, 3), number, dtype=torch.uint8) for number, size in enumerate(sizes)]
    wholes = [
        WholeImage(n, p, torch.from_numpy(label)) for n, (p, label) in enumerate(zip(pixels, labels, strict=True))
    ]
    images = SimpleNamespace(images=lambda rank, size: iter(wholes[rank::size]))
    given = SimpleNamespace(classes=lambda model, pixels: torch.from_numpy(found[int(pixels[0, 0, 0])]))
    confusion, ignored = np.zeros((2, 2), np.int64), 0
    for label, prediction in zip(labels, found, strict=True):
        for i, j in zip(label.ravel(), prediction.ravel(), strict=True):
            if i < 0:
                ignored += 1
            else:
                confusion[i, j] += 1
    alive = []
    scores = evaluate_segmentation(None, images, given, ["ant", "bee"], CPU, 2, lambda: alive.append(1))
    np.testing.assert_array_equal(scores.confusion, confusion)
    assert (scores.names, scores.images, scores.ignored, len(alive)) == (("ant", "bee"), 3, ignored, 3)
    assert 0 < ignored < 41
    for number, shown in enumerate(scores.examples):
        for array, expected in zip(shown, (pixels[number].numpy(), labels[number], found[number]), strict=True):
            np.testing.assert_array_equal(array, expected)
    assert len(scores.examples) == 2
    assert evaluate_segmentation(None, images, given, ["ant", "bee"], CPU).examples == []
    nothing = [WholeImage(0, pixels[0], torch.full(sizes[0], -1))]
    with pytest.raises(ValueError, match="not one labelled pixel of a validation image could be used"):
        evaluate_segmentation(None, SimpleNamespace(images=lambda rank, size: nothing), given, ["ant", "bee"], CPU)


# Windows.


class Patterned(torch.nn.Module):
    """Logits that depend on where a pixel lies in its window, so that every overlap shows."""

    def __init__(self, side, classes=3):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(classes, 3, generator=generator)
        self.place = torch.randn(classes, side, side, generator=generator)

    def predict(self, images):
        return torch.einsum("oc,bchw->bohw", self.weight, images) + self.place


def brute_force(model, image, window, stride):
    """Every window of the official grid one after the other, every pixel averaged on its own."""
    height, width = image.shape[-2:]
    canvas = torch.zeros(3, max(height, window), max(width, window))
    canvas[:, :height, :width] = image
    found = [[[] for _ in range(canvas.shape[2])] for _ in range(canvas.shape[1])]
    rows = math.ceil(max(canvas.shape[1] - window, 0) / stride) + 1
    columns = math.ceil(max(canvas.shape[2] - window, 0) / stride) + 1
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride + window, canvas.shape[1]), min(column * stride + window, canvas.shape[2])
            top, left = bottom - window, right - window
            scores = model.predict(canvas[None, :, top:bottom, left:right])[0]
            for y in range(window):
                for x in range(window):
                    found[top + y][left + x].append(scores[:, y, x])
    return torch.stack(
        [torch.stack([torch.stack(found[y][x]).mean(0) for x in range(width)], 1) for y in range(height)], 1
    )


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (37, 29), (9, 30), (10, 12)])
@pytest.mark.parametrize(("window", "stride"), [(16, 11), (16, 16), (12, 5)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_sliding_windows_are_brute_force(size, window, stride, batch_size):
    model = Patterned(window)
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
    found = sliding_logits(model.predict, image, window, stride, batch_size)
    torch.testing.assert_close(found, brute_force(model, image, window, stride))


def test_official_windows():
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]
    assert window_starts(1365, 640, 426) == [0, 426, 725]
    with pytest.raises(ValueError, match="1 <= stride <= window"):
        sliding_logits(lambda x: x, torch.zeros(3, 8, 8), 8, 9)


def test_inference_is_its_parts():
    """Scale, normalise, slide, resize, and over scales and mirror images the mean of the class shares."""
    model = Patterned(16)
    pixels = torch.randint(0, 256, (22, 35, 3), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    levels = pixels.permute(2, 0, 1)[None].float()

    def logits(size, mirrored=False):
        x = F.interpolate(levels, size=size, mode="bilinear", antialias=True)[0] / 127.5 - 1
        y = sliding_logits(model.predict, x.flip(-1) if mirrored else x, 16, 10)
        return F.interpolate((y.flip(-1) if mirrored else y)[None], size=(22, 35), mode="bilinear")[0]

    single = Inference(*HALF, 16, 10, (60, 24))
    assert single.sizes(22, 35) == [(24, 38)]
    assert torch.equal(single.classes(model, pixels), logits((24, 38)).argmax(0))
    assert single.sizes(22, 200) == [scaled_size(22, 200, (60, 24))] == [(7, 60)]
    many = Inference(*HALF, 16, 10, (60, 24), (0.5, 1.0, 1.5), flip=True)
    assert many.sizes(22, 35) == [(16, 25), (24, 38), (36, 57)]  # the short side is at least a window
    shares = sum(logits(size, mirrored).softmax(0) for size in many.sizes(22, 35) for mirrored in (False, True))
    assert (many.classes(model, pixels) == shares.argmax(0)).float().mean() > 0.999
    with pytest.raises(ValueError, match="positive ratios"):
        Inference(*HALF, 16, 10, (60, 24), ())


@pytest.mark.parametrize(
    ("ratios", "flip", "size", "sizes"),
    [
        ((1.0,), False, (22, 35), [(24, 38)]),
        ((1.0,), False, (40, 60), [(24, 36)]),  # smaller: antialiased
        ((1.0,), False, (24, 30), [(24, 30)]),
        ((1.0,), True, (22, 100), [(24, 109)]),  # longer than the longest side of one scale alone
        ((2.0,), False, (22, 35), [(48, 76)]),
        ((0.5, 1.5), False, (22, 35), [(16, 25), (36, 57)]),
    ],
)
def test_every_scale_and_mirror_image_has_the_same_share(ratios, flip, size, sizes):
    model = Patterned(16)
    inference = Inference(*HALF, 16, 10, (60, 24), ratios, flip)
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    levels, shares = pixels.permute(2, 0, 1)[None].float(), []
    assert inference.sizes(*size) == sizes
    for scaled in sizes:
        x = F.interpolate(levels, size=scaled, mode="bilinear", antialias=True)[0] / 127.5 - 1
        for mirrored in [False, True][: 1 + flip]:
            y = sliding_logits(model.predict, x.flip(2) if mirrored else x, 16, 10)
            y = F.interpolate((y.flip(2) if mirrored else y)[None], size=size, mode="bilinear")[0]
            shares.append(y.softmax(0))
    expected = torch.stack(shares).mean(0).argmax(0)
    assert (inference.classes(model, pixels) == expected).float().mean() > 0.999
    assert len(shares) == 1 or any((expected != share.argmax(0)).any() for share in shares)


def test_the_published_evaluation_is_the_default():
    inference = Inference(*HALF)
    assert (inference.window, inference.stride, inference.base) == (512, 341, (2048, 512))
    assert (inference.ratios, inference.flip) == ((1.0,), False)
    for fixed in (inference, SegmentationScores(("ant",), np.array([[1]]), 1)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            fixed.images = 2


@pytest.mark.parametrize("values", [{"stride": 1}, {"stride": 16}, {"base": (9, 1)}, {"ratios": (2.0, 0.01)}])
def test_the_smallest_and_largest_that_an_evaluation_takes(values):
    Inference(*HALF, **{"window": 16, "stride": 10} | values)


@pytest.mark.parametrize(
    "values", [{"stride": 0}, {"stride": 17}, {"base": (9, 0)}, {"ratios": (1.0, 0.0)}, {"ratios": (-1.0,)}]
)
def test_what_an_evaluation_does_not_take(values):
    values = {"window": 16, "stride": 10, "base": (60, 24), "ratios": (1.0,)} | values
    with pytest.raises(ValueError, match="needs positive ratios and base, and a stride in") as error:
        Inference(*HALF, **values)
    named = (values["ratios"], values["base"], values["stride"], values["window"])
    assert str(error.value).endswith("got " + ", ".join(map(str, named)))


def test_ranks_count_every_image_once(tmp_path):
    data = builtin_segmentation(str(tmp_path), 5, 48, train=False)
    torch.manual_seed(0)
    model = BeitForSemanticSegmentation(MODEL.segmentor(len(data.classes))).eval()
    with torch.no_grad():
        model.decode_head.conv_seg.weight.normal_()
    inference = Inference(*HALF, 32, 21, (48, 48))

    def evaluate(world):
        whole = WholeImages(data, threads=1)
        try:
            return evaluate_segmentation(model, whole, inference, data.classes, world, pictures=2)
        finally:
            whole.close()

    alone = evaluate(CPU)
    totals = []
    results = [evaluate(Rank(rank, 3, totals)) for rank in range(3)]
    assert alone.images == results[-1].images == 5
    assert alone.confusion.sum() == 5 * 48 * 48
    assert (alone.confusion.sum(0) > 0).sum() > 2
    np.testing.assert_array_equal(results[-1].confusion, alone.confusion)
    assert len(alone.examples) == 2
