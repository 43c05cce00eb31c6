"""Accuracy, recomputed image by image: with ties, over ranks, and what the tables and the picture say of it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from beit_fast.train.distributed.world import World
from beit_fast.train.evaluation.classification import Evaluation, evaluate_classifier

CPU = World(0, 1, torch.device("cpu"))


class Logits:
    """In place of images: each batch holds the logits themselves, and the model passes them on."""

    def __init__(self, logits, labels):
        self.logits, self.labels = logits, labels

    def batches(self, batch_size, rank, size):
        for start in range(rank * batch_size, len(self.labels), size * batch_size):
            rows = slice(start, start + batch_size)
            yield SimpleNamespace(images=self.logits[rows], labels=self.labels[rows])


def test_equal_logits_go_by_the_number_of_the_class():
    """By brute force: classes from the largest logit down, of equal ones the first class first; most rows have ties."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (300, 8), generator=generator).float()
    logits[:20] = 0.0
    labels = torch.randint(0, 7, (300,), generator=generator)
    names = [f"class {number}" for number in range(8)]
    calls = []
    found = evaluate_classifier(nn.Identity(), Logits(logits, labels), names, 7, CPU, lambda: calls.append(1))
    images, top1, top5, confusion, loss = [0] * 8, [0] * 8, [0] * 8, np.zeros((8, 8), int), 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        order = sorted(range(8), key=lambda number: (-row[number], number))
        images[label] += 1
        top1[label] += order[0] == label
        top5[label] += label in order[:5]
        confusion[label][order[0]] += 1
        loss += math.log(sum(map(math.exp, row))) - row[label]
    assert (found.images.tolist(), found.top1.tolist(), found.top5.tolist()) == (images, top1, top5)
    np.testing.assert_array_equal(found.confusion, confusion)
    assert found.metrics() == {
        "validation_loss": pytest.approx(loss / 300, rel=1e-6), "top1_percent": 100 * sum(top1) / 300,
        "top5_percent": 100 * sum(top5) / 300, "validation_images": 300,
    }  # fmt: skip
    assert found.classes == tuple(names)
    assert len(calls) == math.ceil(300 / 7)


def test_logits_that_are_no_numbers_are_not_right():
    logits = torch.full((4, 6), float("nan"))
    found = evaluate_classifier(nn.Identity(), Logits(logits, torch.tensor([1, 2, 3, 5])), "abcdef", 2, CPU)
    assert (found.top1.sum(), found.top5.tolist()) == (0, [0, 1, 1, 1, 0, 0])


@pytest.mark.parametrize(("classes", "kept"), [(1000, True), (1001, False)])
def test_many_classes_keep_no_confusion(classes, kept, tmp_path):
    logits = torch.eye(classes)[[3, 999, 3]]
    found = evaluate_classifier(nn.Identity(), Logits(logits, torch.tensor([3, 999, 0])), ["x"] * classes, 2, CPU)
    assert (found.top1.sum(), found.top5[0], found.images.sum()) == (2, 1, 3)
    assert (found.confusion is not None) == kept
    if kept:
        assert (found.confusion[0, 3], found.confusion[3, 3], found.confusion.sum()) == (1, 1, 3)
    else:
        assert found.write(tmp_path) == [tmp_path / "per_class.tsv"]
        rows = (tmp_path / "per_class.tsv").read_text().splitlines()
        assert rows[1:] == ["x\t1\t0.00\t100.00\t", "x\t1\t100.00\t100.00\t", "x\t1\t100.00\t100.00\t"]


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="not one validation image could be used; bad files are named above"):
        evaluate_classifier(nn.Identity(), Logits(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)), "abc", 2, CPU)


@pytest.mark.parametrize("classes", [40, 41])
def test_the_picture_is_the_shares_of_the_confusion(classes, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: drawn.append((figure, path, dpi)))
    confusion = np.eye(classes, dtype=np.int64) * 3
    confusion[1] = 0
    confusion[2, 0] = confusion[3, 3] = 1
    images = confusion.sum(1)
    hits = confusion.diagonal().copy()
    found = Evaluation(tuple(f"c{n}" for n in range(classes)), images, hits, hits, 1.0, confusion)
    assert found.write(tmp_path)[1] == tmp_path / "confusion.png"
    ((figure, path, dpi),) = drawn
    axes, scale = figure.axes
    (picture,) = axes.images
    expected = 100 * np.eye(classes)
    expected[1, 1], expected[2, 2], expected[2, 0] = 0, 75, 25
    np.testing.assert_array_equal(picture.get_array(), expected)
    assert (picture.get_clim(), picture.get_cmap().name) == ((0, 100), "viridis")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("taken for", "true class")
    assert axes.get_title() == f"top-1 {100 * hits.sum() / images.sum():.2f} % of {images.sum()} images"
    assert scale.get_ylabel() == "% of the true class"
    labels = [[text.get_text() for text in axis.get_ticklabels()] for axis in (axes.xaxis, axes.yaxis)]
    names = list(found.classes)
    assert (labels == [names, names]) == (classes == 40)
    if classes == 40:
        first = (axes.get_xticklabels()[0], axes.get_yticklabels()[0])
        assert [(text.get_rotation(), text.get_size()) for text in first] == [(90, 7), (0, 7)]
    assert (path, dpi, tuple(figure.get_size_inches())) == (tmp_path / "confusion.png", 120, (8, 7))


def test_the_table_begins_with_the_worst_class(tmp_path):
    """Of one image, of which it is all; of four, three right and one taken for the first; of none, left out."""
    confusion = np.array([[1, 0, 0, 0], [1, 3, 0, 0], [0, 0, 0, 0], [0, 2, 2, 0]])
    images, right = np.array([1, 4, 0, 4]), np.array([1, 3, 0, 0])
    found = Evaluation(("one", "four", "none", "lost"), images, right, images, 1.0, confusion)
    with pytest.raises(AttributeError):
        found.loss = 0.0
    assert found.write(tmp_path)[0] == tmp_path / "per_class.tsv"
    assert (tmp_path / "per_class.tsv").read_text() == (
        "class\timages\ttop1_percent\ttop5_percent\tmost_often_taken_for\n"
        "lost\t4\t0.00\t100.00\tfour (2)\nfour\t4\t75.00\t100.00\tone (1)\none\t1\t100.00\t100.00\t\n"
    )
    assert Evaluation(("one",), images[:1], right[:1], right[:1], 1.0, confusion[:1, :1])._taken_for(0) == ""


def test_every_sum_is_added_over_the_ranks():
    """A second rank that counts the same as the first."""

    class Twice(World):
        def sum(self, value):
            return value.mul_(2)

    logits, labels = torch.tensor([[0.0, 2.0], [1.0, 0.0], [5.0, 1.0]]), torch.tensor([1, 1, 0])
    alone, both = (
        evaluate_classifier(nn.Identity(), Logits(logits, labels), "ab", 2, world)
        for world in (CPU, Twice(0, 1, CPU.device))
    )
    for name in ("images", "top1", "top5", "confusion"):
        np.testing.assert_array_equal(getattr(both, name), 2 * getattr(alone, name))
    assert both.loss == pytest.approx(alone.loss)
