"""Linear probes part by part: what is opened when, the scale of features, what is kept and what a plan counts."""

import dataclasses
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from beit_fast.data.classification import LabelledBatch
from beit_fast.models import Beit
from beit_fast.train.checkpoint.run_folder import RunFolder
from beit_fast.train.config import OptimConfig, to_plain
from beit_fast.train.distributed.world import World
from beit_fast.train.tasks.finetune import ClassifierModelConfig, LabelledDataConfig
from beit_fast.train.tasks.probe import (
    FeatureBatch,
    LayerProbes,
    LinearProbe,
    ProbeConfig,
    block_features,
    weights_checksum,
)
from beit_fast.version import __version__

CPU = World(0, 1, torch.device("cpu"))
MODEL = ClassifierModelConfig(size="tiny", width=32, depth=3, num_heads=2, image_size=32, patch_size=8, init_std=0.1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def config(cache, tmp_path):
    data = LabelledDataConfig(
        builtin_images=24, builtin_validation_images=7, builtin_size=32, cache_dir=cache, threads=1
    )
    return ProbeConfig(
        output_dir=tmp_path / "run", scratch=True, steps=2, batch_size=8, augment=False, data=data, model=MODEL,
        feature_batch=5, optim=OptimConfig(clip_grad=None),
    )  # fmt: skip


@pytest.fixture
def built():
    """Builds the task of a configuration; closed after the test."""
    tasks = []

    def build(config):
        tasks.append(LinearProbe(config))
        return tasks[-1], tasks[-1].build(CPU)

    yield build
    for task in tasks:
        task.close()


def test_the_defaults_are_those_of_the_official_evaluation(tmp_path):
    config = ProbeConfig(output_dir=tmp_path, optim=OptimConfig(clip_grad=None))
    assert (config.features, config.standardise, config.augment) == ("cls+mean", False, True)
    assert (config.weights, config.scratch) == (None, False)
    with pytest.raises(ValueError, match="--weights is missing: name the model to probe, or --scratch for random"):
        dataclasses.replace(config, data=LabelledDataConfig(path="x"))
    assert dataclasses.replace(config, weights="x").weights == "x"
    batch = FeatureBatch(torch.zeros(3, 2, 1), torch.zeros(3, dtype=torch.int64))
    assert len(batch) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.labels = None


def test_a_probe_starts_small_and_scales_its_inputs():
    torch.manual_seed(0)
    probes = LayerProbes(2, 300, 50)
    assert probes.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert probes.weight.mean().item() == pytest.approx(0, abs=3e-4)
    assert not probes.bias.any()
    features = torch.randn(4, 2, 300)
    torch.testing.assert_close(probes(features)[:, 1], features[:, 1] @ probes.weight[1])
    with torch.no_grad():
        probes.bias.normal_()
        probes.mean.normal_()
        probes.std.uniform_(1, 2)
    expected = ((features[:, 1] - probes.mean[1]) / probes.std[1]) @ probes.weight[1] + probes.bias[1]
    torch.testing.assert_close(probes(features)[:, 1], expected)


@pytest.mark.parametrize("features", ["cls+mean", "mean", "cls"])
def test_probes_are_as_wide_as_the_features_of_a_frozen_model(config, built, features):
    task, probes = built(dataclasses.replace(config, features=features))
    assert probes.weight.shape == (3, 64 if features == "cls+mean" else 32, 24)
    assert task.cache.take(np.arange(2))[0].shape == (2, *probes.weight.shape[:2])
    assert task.frozen() == [task.backbone]
    assert not task.backbone.training
    assert not any(parameter.requires_grad for parameter in task.backbone.parameters())


def test_cached_features_are_those_of_the_images(config, built):
    task, _ = built(config)
    for kept, images in ((task.cache, task.others[1]), (task.validation_cache, task.validation_loader)):
        batches = list(images.batches(4))
        pictures, labels = torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])
        features, found = kept.take(kept.rows())
        torch.testing.assert_close(features, block_features(task.backbone, pictures, "cls+mean"), rtol=1e-4, atol=1e-5)
        assert torch.equal(found, labels)
    assert (len(task.cache.rows()), len(task.validation_cache.rows()), task.num_samples()) == (24, 7, 24)


def test_every_rank_validates_its_share_in_small_batches(config, built):
    task, _ = built(config)
    features, labels = task.validation_cache.take(np.arange(7))
    for cached in (True, False):
        task.validation_cache = task.validation_cache if cached else None
        for rank in (0, 1):
            task.world = World(rank, 2, torch.device("cpu"))
            batches = list(task._validation_batches(task.validation_loader))
            assert max(map(len, batches)) <= 5
            assert torch.equal(torch.cat([b.labels for b in batches]), labels[rank::2])
            found = torch.cat([b.features for b in batches])
            torch.testing.assert_close(found, features[rank::2], rtol=1e-4, atol=1e-5)
    task.world = CPU


def test_without_validation_nothing_is_measured(config, built):
    data = dataclasses.replace(config.data, validate=False)
    task, probes = built(dataclasses.replace(config, data=data))
    assert (task.validation_loader, task.validation_cache, task.evaluate(probes, 0)) == (None, None, {})
    assert task.num_samples() == 24


@pytest.mark.parametrize(
    "changes", [{"dry_run": True, "standardise": True}, {"augment": True}, {"augment": True, "dry_run": True}]
)
def test_no_feature_is_computed_before_it_is_needed(config, built, monkeypatch, changes):
    """A dry run, and views that change; the scale stays 0 and 1."""
    monkeypatch.setattr(LinearProbe, "_features", None)
    task, probes = built(dataclasses.replace(config, **changes))
    assert (task.cache, task.num_samples()) == (None, 24)
    assert not probes.mean.any()
    assert (probes.std == 1).all()


@pytest.mark.parametrize(("size", "used"), [(64, 2048), (89, 2136), (5000, 3000)])
def test_the_scale_is_that_of_the_first_images(config, monkeypatch, size, used):
    """Whole batches until there are 2048 images; a feature that never changes is not divided by 0."""
    task, probes = LinearProbe(config), LayerProbes(2, 3, 4)
    features = torch.randn(3000, 2, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    features[:, 0, 1] = 7
    nothing = torch.zeros(0, dtype=torch.int64)
    batches = [LabelledBatch(part, nothing, nothing, nothing) for part in features.split(size)]
    loader = SimpleNamespace(batches=lambda feature_batch: iter(batches))
    task.training = None
    monkeypatch.setattr(task, "_evaluation_loader", lambda images: loader)
    monkeypatch.setattr(task, "_features", lambda images: images)
    task._standardise(probes, task._statistics())
    values = features[:used].double().numpy()
    np.testing.assert_allclose(probes.mean.numpy(), values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(probes.std.numpy(), np.maximum(values.std(0), 1e-6), rtol=1e-6)


def test_features_are_computed_in_the_precision_of_the_run(config):
    torch.manual_seed(0)
    task, model, images = LinearProbe(config), Beit(MODEL.classifier(0)).eval(), torch.randn(2, 3, 32, 32)
    task.backbone, task.world = model, CPU
    with torch.no_grad():
        exact = block_features(model, images, "cls+mean")
        with torch.autocast("cpu", torch.bfloat16):
            rounded = block_features(model, images, "cls+mean")
    assert not torch.equal(exact, rounded)
    for task.dtype, expected in ((torch.float32, exact), (torch.bfloat16, rounded)):
        found = task._features(images)
        assert torch.equal(found, expected)
        assert (found.dtype, found.requires_grad) == (torch.float32, False)


def test_a_checksum_is_that_of_all_numbers_by_name():
    layer = nn.Linear(2, 1)
    data = b"bias" + layer.bias.detach().numpy().tobytes() + b"weight" + layer.weight.detach().numpy().tobytes()
    assert weights_checksum(layer) == f"{zlib.crc32(data):08x}"


def test_a_plan_counts_the_forward_pass_alone(config):
    """Two FLOPs a multiply-add: patches, then 3 blocks of 12 D^2 per token and two products of N x N x D."""
    task = LinearProbe(config)
    task.backbone = Beit(MODEL.classifier(0))
    forward = 2 * (16 * 32 * 192 + 3 * (12 * 17 * 32**2 + 2 * 17**2 * 32))
    assert task.plan() == {"forward_flops_per_image": forward, "flops_per_image": forward}


def test_a_run_is_not_continued_with_other_weights(config, tmp_path, monkeypatch):
    before = dataclasses.replace(config, scratch=False, weights="a.pth")
    run = RunFolder(tmp_path)
    saved = {"config": to_plain(before), "task": "linear_probe", "version": __version__}
    monkeypatch.setattr(run, "saved", lambda: saved)
    run.compare(before, "linear_probe")
    with pytest.raises(ValueError, match=r'weights: "a\.pth" in that run, "b\.pth" now'):
        run.compare(dataclasses.replace(before, weights="b.pth"), "linear_probe")
