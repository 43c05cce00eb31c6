"""Labelled views by hand: what is done to them unless asked otherwise, repetitions, geometry, what is refused."""

import dataclasses

import numpy as np
import pytest
import torch

from beit_fast.data.augmentation.erasing import RandomErasing
from beit_fast.data.augmentation.rand_augment import Augmenter, RandAugment
from beit_fast.data.builtin import render_labelled
from beit_fast.data.classification import (
    Augmentation,
    ClassificationLoader,
    EvaluationLoader,
    default_crop_share,
    evaluation_geometry,
)
from beit_fast.data.loader import Request
from beit_fast.data.sampling import epoch_order, sample_keys
from beit_fast.data.screening import BadImages
from beit_fast.data.sources import ArraySource

BLACK_AND_WHITE = ArraySource([np.zeros((9, 12, 3), np.uint8), np.full((9, 12, 3), 255, np.uint8)])
SCENES = ArraySource([render_labelled(index, 0, 48)[0][:40] for index in range(8)])
LABELS = np.arange(8) * 3


def training(augmentation, *requests, source=SCENES, **options):
    options = {"seed": 1, "image_size": 32, "threads": 1, "decoder": "pil"} | options
    with ClassificationLoader(source, LABELS[: len(source)], augmentation, **options) as loader:
        return list(loader.batches(requests))


def test_views_unless_asked_otherwise():
    """The paper's: 224 pixels, black is -1 and white 1; two batches are made ahead, drawn from 8 % of the image up."""
    values = ((0.08, 1.0), (0.75, 4 / 3), 0.5, None, None, 1)
    assert dataclasses.astuple(Augmentation()) == values
    assert hash(Augmentation()) == hash(Augmentation(*values))
    images = BLACK_AND_WHITE
    with ClassificationLoader(source=images, labels=[3, 4], augmentation=Augmentation(), seed=0, threads=1) as loader:
        (batch,) = loader.batches([Request(0, np.arange(2))])
        assert loader.prefetch == 2
    with EvaluationLoader(source=images, labels=[3, 4], threads=1) as loader:
        (whole,) = loader.batches(2)
        assert (loader.prefetch, loader.crop_share) == (2, 0.875)
    for found in (batch, whole):
        expected = found.indices.float()[:, None, None, None].expand(2, 3, 224, 224) * 2 - 1
        assert torch.equal(found.images, expected)
        assert torch.equal(found.labels, found.indices + 3)
    assert len(whole) == 2
    assert whole.sample_keys.tolist() == [0, 0]
    assert (batch.rectangles, batch.label_weight) == (None, None)
    for frozen in (Augmentation(), batch):
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.repeats = 3


def test_a_repetition_is_the_view_of_an_epoch_of_its_own():
    """Of three in epoch 2, the repetitions are the views of epochs 6, 7, 8 without repetition."""
    (batch,) = training(Augmentation(repeats=3), Request(2, np.arange(1, 8)))
    indices = epoch_order(np.arange(8), 8, 1, 2)[np.arange(1, 8) // 3]
    assert batch.indices.tolist() == indices.tolist()
    for row, (index, repetition) in enumerate(zip(indices, [1, 2, 0, 1, 2, 0, 1], strict=True)):
        (plain,) = training(Augmentation(), Request(6 + repetition, np.arange(8)))
        same = (plain.indices == index).nonzero().item()
        assert torch.equal(batch.images[row], plain.images[same])
        assert batch.sample_keys[row] == sample_keys(1, 6 + repetition, [index])[0]


def test_rand_augment_is_done_to_the_views():
    upright = Augmentation(flip_probability=0.0)
    (plain,) = training(upright, Request(0, np.arange(8)))
    (found,) = training(dataclasses.replace(upright, rand_augment=RandAugment()), Request(0, np.arange(8)))
    pixels = ((plain.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    views = Augmenter(1).apply(pixels, RandAugment().sample(plain.sample_keys))
    torch.testing.assert_close(found.images, views.permute(0, 3, 1, 2) / 127.5 - 1)
    assert (found.images != plain.images).flatten(1).any(1).sum() > 3


def test_erasing_is_drawn_for_the_views():
    erasing = RandomErasing(probability=0.6)
    (batch,) = training(Augmentation(erasing=erasing), Request(0, np.arange(8)))
    np.testing.assert_array_equal(batch.rectangles, erasing.sample(batch.sample_keys, (32, 32)))


def test_a_share_of_one_is_the_default_from_384_pixels_on():
    shares = {1: 0.875, 224: 0.875, 383: 0.875, 384: 1.0, (383, 500): 0.875, (500, 384): 1.0}
    assert {size: default_crop_share(size) for size in shares} == shares


@pytest.mark.parametrize(
    ("size", "view", "share", "expected"),
    [
        ((40, 90), (16, 32), 0.875, (18, 41, 1, 4)),  # 18.3 x 36.6 is covered: 18.29 / 40 times the image, 41.1
        ((90, 40), (16, 32), 0.875, (82, 36, 33, 2)),
        ((90, 40), (32, 16), 0.5, (72, 32, 20, 8)),  # 64 x 32: 0.8 times the image
        ((10, 10), (16, 32), 1.0, (32, 32, 8, 0)),
        ((40, 90), 32, 0.875, (36, 81, 2, 24)),  # half of 49 is rounded to an even number
        ((90, 40), (32, 32), 1.0, (72, 32, 20, 0)),
        ((50, 50), 32, 0.5, (64, 64, 16, 16)),
    ],
)
def test_the_geometry_of_evaluation_by_hand(size, view, share, expected):
    assert evaluation_geometry(*size, view, share) == expected


def test_a_batch_without_a_good_image_is_left_out():
    """Every image of the second batch is refused; the others keep their labels."""
    files = [SCENES.read(index) for index in range(6)]
    files[2] = files[3] = b"nothing"
    source = ArraySource([SCENES._images[index] for index in range(6)])
    source.read = files.__getitem__
    bad = BadImages(6, max_share=1.0)
    with EvaluationLoader(source, LABELS[:6], image_size=16, threads=1, decoder="pil", bad_images=bad) as loader:
        found = [(batch.indices.tolist(), batch.labels.tolist()) for batch in loader.batches(2)]
    assert found == [([0, 1], [0, 3]), ([4, 5], [12, 15])]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 1, "crop_share": 1.0}, None), ({"crop_share": 0.01}, None), ({"image_size": (4, 8)}, None),
        ({"crop_share": 0}, r"crop_share must be in \(0, 1\], got 0"), ({"crop_share": -0.5}, "crop_share must be in"),
        ({"crop_share": 1.01}, "crop_share must be in"), ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"image_size": (8, -1)}, "image_size must be at least 1, got"),
    ],
)  # fmt: skip
def test_what_evaluation_takes(options, message):
    options = {"threads": 1, "decoder": "pil"} | options
    if message is None:
        EvaluationLoader(SCENES, LABELS, **options).close()
        return
    with pytest.raises(ValueError, match=message):
        EvaluationLoader(SCENES, LABELS, **options)


def test_channels_of_their_own_take_no_rand_augment():
    gray = ArraySource([np.full((12, 12, 1), 51, np.uint8)] * 2)
    options = {"source": gray, "channels": 1, "mean": (0.1,), "std": (0.1,)}
    (batch,) = training(Augmentation(), Request(0, np.arange(2)), **options)
    torch.testing.assert_close(batch.images, torch.ones(2, 1, 32, 32))
    with pytest.raises(ValueError, match=r"RandAugment is made for RGB of 8 bits; with --data\.channels, --augment"):
        training(Augmentation(rand_augment=RandAugment()), **options)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        Augmentation(repeats=0)
