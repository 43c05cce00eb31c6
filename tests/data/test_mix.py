"""Mixup, CutMix and random erasing against timm's formulas and against statistics."""

import math
import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from beit_fast.data.augmentation.erasing import RandomErasing, erase
from beit_fast.data.augmentation.mix import Mix, Mixing, cutmix, mix_images, mixed_cross_entropy, paired_order
from beit_fast.data.sampling import uniforms
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable

make_torchvision_importable()
timm_mixup = pytest.importorskip("timm.data.mixup")
timm_erasing = pytest.importorskip("timm.data.random_erasing")

KEYS = np.random.default_rng(5).integers(-(2**63), 2**63 - 1, 20_000)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(8, 3, 12, 10), torch.randint(0, 7, (8,)), torch.randn(8, 7)


def timm_batch_mix(images, mix):
    """timm's `Mixup._mix_batch`, its own code, with this mix in place of its random one."""

    class Given(timm_mixup.Mixup):
        def _params_per_batch(self):
            return mix.lam, mix.box is not None

    if mix.box is None:
        timm = Given(mixup_alpha=1.0, cutmix_alpha=0.0)
        timm._mix_batch(images)
        return images
    top, bottom, left, right = mix.box
    images[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return images


@pytest.mark.parametrize("mix", [Mix(0.3, None), Mix(0.8, (2, 9, 0, 4)), Mix(1.0, None)])
def test_images_targets_and_loss_are_timms(batch, mix):
    images, labels, logits = batch
    order = torch.from_numpy(paired_order(8))
    expected = timm_batch_mix(images.clone(), mix)
    target = timm_mixup.mixup_target(labels, 7, lam=mix.lam, smoothing=0.1)
    kept = images[order].clone()
    torch.testing.assert_close(mix_images(kept, mix), expected[order])
    torch.testing.assert_close(kept, images[order])  # the input is not written to
    loss = mixed_cross_entropy(logits[order], labels[order], mix.lam, 0.1)
    torch.testing.assert_close(loss.mean(), -(target * logits.log_softmax(1)).sum(1).mean())


def test_each_part_of_a_batch_mixes_as_the_whole(batch):
    images, labels, logits = batch
    mix = Mix(0.6, (1, 5, 2, 8))
    whole, parts = mix_images(images, mix), [mix_images(part, mix) for part in images.split([2, 4, 2])]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)
    losses = [mixed_cross_entropy(x, y, 0.6, 0.1) for x, y in zip(logits.split(2), labels.split(2), strict=True)]
    torch.testing.assert_close(torch.cat(losses), mixed_cross_entropy(logits, labels, 0.6, 0.1))


def test_lambda_may_live_on_the_device(batch):
    _, labels, logits = batch
    expected = mixed_cross_entropy(logits, labels, 0.25, 0.1)
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, torch.tensor(0.25), 0.1), expected)


@pytest.mark.parametrize("lam", [0.02, 0.37, 0.9, 1.0])
def test_cutmix_box_and_lambda_are_timms(monkeypatch, lam):
    for y in (0.0, 0.21, 0.5, 0.999):
        for x in (0.0, 0.4, 0.97):
            centre = iter((int(y * 33), int(x * 20)))
            monkeypatch.setattr(np.random, "randint", lambda *a, centre=centre, **k: next(centre))
            (top, bottom, left, right), expected = timm_mixup.cutmix_bbox_and_lam((2, 3, 33, 20), lam)
            mix = cutmix(lam, (33, 20), y, x)
            assert mix.box == (top, bottom, left, right)
            assert mix.lam == pytest.approx(expected, abs=1e-12)


def test_a_mix_is_a_function_of_seed_and_step_with_the_right_frequencies():
    mixing = Mixing()
    mixes = [mixing.sample(3, step, (16, 16)) for step in range(4000)]
    assert mixes[7] == mixing.sample(3, 7, (16, 16)) != mixing.sample(4, 7, (16, 16))
    cut = [m for m in mixes if m.box is not None]
    assert abs(len(cut) / 4000 - 0.5) < 0.03
    plain = np.array([m.lam for m in mixes if m.box is None])
    assert abs(plain.mean() - 0.5) < 0.03
    assert plain.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.07)  # Beta(a, a) has variance 1/(4(2a+1))
    half = [Mixing(probability=0.5).sample(0, step, (16, 16)).lam for step in range(2000)]
    assert abs(np.mean(np.array(half) == 1.0) - 0.5) < 0.05
    assert all(m.sample(0, s, (8, 8)).box is None for m in (Mixing(cutmix_alpha=0), Mixing(0, 0)) for s in range(50))
    assert all(Mixing(mixup_alpha=0).sample(0, s, (8, 8)).box is not None for s in range(50))


def test_pairs_are_i_and_its_mirror():
    order = paired_order(6)
    assert order.tolist() == [0, 5, 1, 4, 2, 3]
    with pytest.raises(ValueError, match="must be even, not 7"):
        paired_order(7)


@pytest.mark.parametrize(("values", "name"), [({"mixup_alpha": -1}, "alphas"), ({"probability": 2}, "probabilities")])
def test_bad_mixing_is_named(values, name):
    with pytest.raises(ValueError, match=name):
        Mixing(**values)


def test_uniforms_are_uniform_and_do_not_depend_on_the_batch():
    u = uniforms(KEYS, 6, stream=1)
    assert u.min() >= 0
    assert u.max() < 1
    histogram = np.histogram(u, 50, (0, 1))[0]
    expected = u.size / 50
    assert ((histogram - expected) ** 2 / expected).sum() < 49 + 4 * math.sqrt(2 * 49)  # chi square, 49 degrees
    assert abs(np.corrcoef(np.column_stack([u, uniforms(KEYS, 2, stream=2)]).T) - np.eye(8)).max() < 0.04
    np.testing.assert_array_equal(uniforms(KEYS[7:9], 6, stream=1), u[7:9])
    consecutive = uniforms(np.arange(20_000), 1, stream=3)[:, 0]
    assert abs(np.corrcoef(consecutive[:-1], consecutive[1:])[0, 1]) < 0.03


def test_rectangles_have_timms_distribution():
    """timm's own eraser, run on constant images, is the yardstick for area and place."""
    random.seed(0)
    timm = timm_erasing.RandomErasing(probability=1.0, mode="const", device="cpu")
    erased = np.stack([timm(torch.ones(1, 24, 32))[0].numpy() == 0 for _ in range(len(KEYS))])
    rectangles = RandomErasing(probability=1.0).sample(KEYS, (24, 32))
    ours = np.zeros((24, 32))
    for top, left, height, width in rectangles[rectangles[:, 2] > 0]:
        assert 0 <= top <= 24 - height
        assert 0 <= left <= 32 - width
        ours[top : top + height, left : left + width] += 1
    assert ks_2samp(rectangles[:, 2] * rectangles[:, 3], erased.sum((1, 2))).pvalue > 1e-3
    assert ks_2samp(rectangles[:, 2], erased.any(2).sum(1)).pvalue > 1e-3
    np.testing.assert_allclose(ours / len(KEYS), erased.mean(0), atol=0.015)
    share = (RandomErasing().sample(KEYS, (24, 32))[:, 2] > 0).mean()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(KEYS))


def test_noise_fills_exactly_the_rectangles_and_is_normal():
    keys = torch.from_numpy(KEYS[:64])
    rectangles = RandomErasing(probability=0.7).sample(KEYS[:64], (48, 40))
    images = torch.full((64, 3, 48, 40), 7.0)
    assert erase(images, rectangles, keys) is images
    inside = torch.zeros(64, 1, 48, 40, dtype=torch.bool)
    for n, (top, left, height, width) in enumerate(rectangles):
        inside[n, :, top : top + height, left : left + width] = True
    assert torch.equal((images != 7.0).all(1, keepdim=True), inside)
    noise = images[inside.expand_as(images)].double().numpy()
    assert len(noise) > 30_000
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs((noise**4).mean() - 3) < 0.15
    channels = images.transpose(0, 1)[:, inside[:, 0]].double().numpy()
    assert abs(np.corrcoef(channels) - np.eye(3)).max() < 0.03
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 0.02


def test_noise_does_not_depend_on_the_batch():
    keys = torch.from_numpy(KEYS[:6])
    rectangles = RandomErasing(probability=1.0).sample(KEYS[:6], (16, 16))
    whole = erase(torch.zeros(6, 3, 16, 16), rectangles, keys)
    parts = [erase(torch.zeros(2, 3, 16, 16), rectangles[n : n + 2], keys[n : n + 2]) for n in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("values", [{"probability": 1.5}, {"min_area": 0.5, "max_area": 0.2}, {"min_aspect": 0}])
def test_bad_erasing_is_named(values):
    with pytest.raises(ValueError, match="erasing"):
        RandomErasing(**values)
