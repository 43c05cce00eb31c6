"""Labelled views against Pillow, torchvision and timm; independence of the split; bad files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.data.augmentation.erasing import RandomErasing
from beit_fast.data.augmentation.rand_augment import OPERATIONS, Augmenter, AugmentPlan, RandAugment
from beit_fast.data.builtin import render_labelled
from beit_fast.data.classification import (
    Augmentation,
    ClassificationLoader,
    EvaluationLoader,
    default_crop_share,
    evaluation_geometry,
)
from beit_fast.data.loader import Request
from beit_fast.data.sampling import CropSampler, epoch_order
from beit_fast.data.sources import ArraySource
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

make_torchvision_importable()
transforms = pytest.importorskip("torchvision.transforms")
auto_augment = pytest.importorskip("timm.data.auto_augment")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(60, 90), (90, 60), (77, 77), (50, 123), (64, 64), (131, 52), (70, 71), (96, 80)]


@pytest.fixture(scope="module")
def pictures():
    drawn = []
    for index, (height, width) in enumerate(SIZES):
        pixels, _ = render_labelled(index, 0, 140)
        drawn.append(np.ascontiguousarray(pixels[:height, :width]))
    return drawn


@pytest.fixture(scope="module")
def source(pictures):
    return ArraySource(pictures)


LABELS = np.arange(8) * 3


def training(source, augmentation=None, **options):
    options = {"seed": 1, "image_size": 32, "threads": 1, "mean": MEAN, "std": STD} | options
    return ClassificationLoader(source, LABELS, augmentation or Augmentation(), **options)


def collect(views, requests):
    batches = list(views.batches(requests))
    views.close()
    return batches


def unnormalise(images):
    return (images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255


@pytest.mark.parametrize("crop_share", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("image_size", [31, 32, 48])
def test_evaluation_geometry_is_torchvisions(image_size, crop_share):
    """Every pixel is numbered, so that a crop shows where it was taken."""
    for height, width in [*SIZES, (375, 500), (500, 375), (333, 499), (48, 49)]:
        resize = transforms.Resize(int(image_size / crop_share), interpolation=transforms.InterpolationMode.BICUBIC)
        whole = resize(Image.new("I", (width, height)))
        numbered = Image.fromarray(np.arange(whole.width * whole.height, dtype=np.int32).reshape(whole.height, -1))
        first = int(np.asarray(transforms.CenterCrop(image_size)(numbered))[0, 0])
        expected = (whole.height, whole.width, *divmod(first, whole.width))
        assert evaluation_geometry(height, width, image_size, crop_share) == expected


@pytest.mark.parametrize("decoder", ["dali", "pil"])
@pytest.mark.parametrize("crop_share", [0.875, 1.0])
def test_evaluation_views_are_torchvisions(source, pictures, decoder, crop_share):
    reference = transforms.Compose(
        [
            transforms.Resize(int(32 / crop_share), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    expected = torch.stack([reference(Image.fromarray(picture)) for picture in pictures])
    views = EvaluationLoader(
        source, LABELS, image_size=32, crop_share=crop_share, mean=MEAN, std=STD, decoder=decoder, threads=1
    )
    batches = list(views.batches(batch_size=3))
    views.close()
    assert [len(batch) for batch in batches] == [3, 3, 2]
    assert torch.cat([batch.labels for batch in batches]).tolist() == LABELS.tolist()
    difference = (unnormalise(torch.cat([batch.images for batch in batches])) - unnormalise(expected)).abs()
    assert difference.mean() < 0.1
    assert difference.max() <= 2.01


def test_ranks_share_the_evaluation_without_repetition(source):
    views = EvaluationLoader(source, LABELS, image_size=32, threads=1)
    seen = [[i for b in views.batches(2, rank, 3) for i in b.indices.tolist()] for rank in range(3)]
    views.close()
    assert seen == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_official_crop_shares():
    assert default_crop_share(224) == 0.875
    assert default_crop_share(384) == default_crop_share(512) == 1.0


def test_training_views_are_the_sampled_windows(source, pictures):
    """Pillow crops, resizes and flips what `sampling` says."""
    batch = collect(training(source), [Request(2, np.arange(8))])[0]
    order = epoch_order(np.arange(8), 8, 1, 2)
    assert batch.indices.tolist() == order.tolist()
    assert batch.labels.tolist() == LABELS[order].tolist()
    shapes = np.array([pictures[i].shape[:2] for i in order])
    windows, flips, _ = CropSampler((0.08, 1), (3 / 4, 4 / 3), 0.5, 0, 0, 0).sample(1, 2, order, *shapes.T)
    assert 0 < flips.sum() < 8
    for row, (index, (top, left, height, width), flip) in enumerate(zip(order, windows, flips, strict=True)):
        image = Image.fromarray(pictures[index]).crop((left, top, left + width, top + height))
        pixels = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).astype(float)
        pixels = pixels[:, ::-1] if flip else pixels
        difference = abs(unnormalise(batch.images[row]).permute(1, 2, 0).numpy() - pixels)
        assert difference.mean() < 0.3
        assert difference.max() < 5


FULL = Augmentation(rand_augment=RandAugment(), erasing=RandomErasing(probability=0.6), repeats=2)


def test_the_split_into_batches_does_not_matter(source):
    whole = collect(training(source, FULL), [Request(3, np.arange(8))])[0]
    requests = [Request(3, part) for part in np.split(np.arange(8), [3, 4])]
    parts = collect(training(source, FULL, prefetch=1, threads=2), requests)
    for name in ("images", "labels", "sample_keys", "indices"):
        torch.testing.assert_close(
            torch.cat([getattr(p, name) for p in parts]), getattr(whole, name), rtol=0, atol=0, msg=name
        )
    np.testing.assert_array_equal(np.concatenate([p.rectangles for p in parts]), whole.rectangles)
    assert 0 < (whole.rectangles[:, 2] > 0).sum() < 8


def test_repetitions_are_different_views_of_one_image(source):
    augmentation = Augmentation(repeats=4)
    batch = collect(training(source, augmentation), [Request(0, np.arange(8))])[0]
    order = epoch_order([0, 1], 8, 1, 0)
    assert batch.indices.tolist() == order.repeat(4).tolist()
    assert len(set(batch.sample_keys.tolist())) == 8
    flat = batch.images.flatten(1)
    distance = torch.cdist(flat, flat) + torch.eye(8) * 1e9
    assert distance.min() > 1
    later = collect(training(source, augmentation), [Request(1, np.arange(8))])[0]
    assert not set(later.sample_keys.tolist()) & set(batch.sample_keys.tolist())


def jpeg(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


class Damaged(ArraySource):
    """Image 2 is cut off (screening sees it), image 5 is broken inside (only the decoder sees it)."""

    def read(self, index):
        data = jpeg(self._images[index])
        if index == 2:
            return data[:200]
        if index == 5:
            header = data.index(b"\xff\xc4")  # the first Huffman table's code lengths
            return data[: header + 5] + b"\xff" * 16 + data[header + 21 :]
        return data


@pytest.mark.parametrize("decoder", ["dali", "pil"])
def test_bad_images_are_replaced_in_training_and_left_out_of_evaluation(pictures, decoder):
    from beit_fast.data.screening import BadImages

    source = Damaged(pictures)
    bad = BadImages(8, max_share=1.0)
    batch = collect(training(source, decoder=decoder, bad_images=bad), [Request(0, np.arange(8))])[0]
    assert set(bad.reasons) == {"array:2", "array:5"}
    order = epoch_order(np.arange(8), 8, 1, 0).tolist()
    for row, index in enumerate(order):
        place = row
        while order[place % 8] in (2, 5):
            place += 1
        assert batch.indices[row] == order[place % 8]
        assert batch.labels[row] == LABELS[order[place % 8]]
        if index not in (2, 5):
            assert place == row
    views = EvaluationLoader(
        source, LABELS, image_size=32, threads=1, decoder=decoder, bad_images=BadImages(8, max_share=1.0)
    )
    seen = [i for b in views.batches(3) for i in b.indices.tolist()]
    views.close()
    assert seen == [0, 1, 3, 4, 6, 7]
    assert len(views.bad_images) == 2


TIMM_NAMES = {
    "auto_contrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing", "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}  # fmt: skip


def test_the_operations_are_timms(monkeypatch):
    assert {TIMM_NAMES[name] for name in OPERATIONS} == set(auto_augment.rand_augment_choices("", increasing=True))
    pictures = np.stack([render_labelled(index, 3, 96)[0] for index in range(3)])
    augmenter = Augmenter(threads=1)
    exact = {"invert", "posterize", "solarize", "solarize_add"}
    for number, name in enumerate(OPERATIONS):
        for level in (0.0, 7.3, 10.0):
            if name == "posterize" and level == 10.0:
                continue  # Pillow refuses the 0 bits that timm asks for
            for sign in (1.0, -1.0):
                monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
                hparams = {"interpolation": Image.Resampling.BILINEAR, "img_mean": (128, 128, 128)}
                timm = auto_augment.AugmentOp(TIMM_NAMES[name], prob=1.0, magnitude=level, hparams=hparams)
                expected = np.stack([np.asarray(timm(Image.fromarray(p))) for p in pictures]).astype(float)
                plan = AugmentPlan(np.full((3, 1), number), np.full((3, 1), level), np.full((3, 1), sign))
                views = augmenter.apply(torch.from_numpy(pictures.copy()), plan).numpy()
                difference = abs(views - expected)
                if name == "sharpness":
                    difference = difference[:, 1:-1, 1:-1]
                limit = 0.0 if name in exact else 8.0 if name == "equalize" else 0.8
                assert difference.mean() <= limit, (name, level, sign)


def test_the_plan_has_timms_frequencies():
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 30_000)
    plan = RandAugment().sample(keys)
    assert plan.operations.shape == (30_000, 2)
    counts = np.bincount(plan.operations.ravel() + 1, minlength=16)
    assert abs(counts[0] / 60_000 - 0.5) < 0.01
    assert abs(counts[1:] / 60_000 - 0.5 / 15).max() < 0.004
    assert abs(plan.levels.mean() - 9.0) < 0.02
    assert plan.levels.max() == 10.0
    assert abs(np.quantile(plan.levels, 0.1587) - 8.5) < 0.02
    assert abs(plan.signs.mean()) < 0.02
    both = (plan.operations >= 0).all(1)
    assert abs((plan.operations[both, 0] == plan.operations[both, 1]).mean() - 1 / 15) < 0.01  # with replacement


def test_views_that_nothing_is_done_to_stay_as_they_are(pictures):
    views = torch.from_numpy(np.stack([render_labelled(i, 0, 32)[0] for i in range(4)]))
    plan = AugmentPlan(np.array([[-1], [2], [-1], [2]]), np.full((4, 1), 9.0), np.ones((4, 1)))
    out = Augmenter(1).apply(views.clone(), plan)
    assert torch.equal(out[[0, 2]], views[[0, 2]])
    assert torch.equal(out[[1, 3]], 255 - views[[1, 3]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: training(s, Augmentation(repeats=0)), "repeats must be at least 1"),
        (lambda s: ClassificationLoader(s, np.arange(3), Augmentation(), seed=0), "labels: 3 for 8 images"),
        (lambda s: training(s, decoder="gpu"), "decoder must be auto, dali or pil"),
        (lambda s: training(s, image_size=0), "image_size must be at least 1"),
        (lambda s: EvaluationLoader(s, LABELS, crop_share=1.5), r"crop_share must be in \(0, 1\], got 1.5"),
        (lambda s: RandAugment(magnitude=11), r"magnitude must be in \[0, 10\]"),
        (lambda s: RandAugment(num_operations=-1), "num_operations >= 0"),
    ],
)
def test_bad_arguments_are_named(source, call, message):
    with pytest.raises(ValueError, match=message):
        call(source)
