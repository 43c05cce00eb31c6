"""Linear probes: raw block outputs, independent classifiers, features that are computed once."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from beit_fast.data.sampling import epoch_order
from beit_fast.models import Beit, convert_state_dict
from beit_fast.train import engine
from beit_fast.train.checkpoint.format import newest_checkpoint
from beit_fast.train.config import LogConfig, OptimConfig
from beit_fast.train.distributed.world import World
from beit_fast.train.schedules import learning_rate, requests_of
from beit_fast.train.tasks.finetune import ClassifierModelConfig, LabelledDataConfig
from beit_fast.train.tasks.probe import FeatureBatch, LayerProbes, LinearProbe, ProbeConfig, block_features
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable
from tests.images import write_class_folders

make_torchvision_importable()

CPU = World(0, 1, torch.device("cpu"))
MODEL = ClassifierModelConfig(
    size="tiny", width=32, depth=3, num_heads=2, image_size=32, patch_size=8, drop_path_rate=0.5, init_std=0.1
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def config(cache, tmp_path):
    return ProbeConfig(
        output_dir=tmp_path / "run",
        scratch=True,
        steps=12,
        batch_size=16,
        batch_per_device=16,
        augment=False,
        data=LabelledDataConfig(
            builtin_images=48, builtin_validation_images=20, builtin_size=32, cache_dir=cache, threads=1
        ),
        model=MODEL,
        optim=OptimConfig(lr=4e-3, min_lr=0.0, warmup_steps=0, weight_decay=1e-2, clip_grad=None),
        log=LogConfig(every_steps=4, progress="none"),
    )


def run(config):
    task = LinearProbe(config)
    result = engine.run(task)
    assert result.exit_code == 0
    return task, result.metrics


def random_model():
    torch.manual_seed(0)
    model = Beit(MODEL.classifier(5)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_features_are_the_raw_outputs_of_timms_blocks():
    peers = pytest.importorskip("benchmarks.baselines.libraries")
    pytest.importorskip("timm")
    model = random_model()
    timm = peers.timm_beit(model.config).eval()
    timm.load_state_dict(convert_state_dict(model.state_dict(), to="timm"))
    outputs = []
    for block in timm.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        timm(images)
        both, mean, cls = (block_features(model, images, kind) for kind in ("cls+mean", "mean", "cls"))
    assert both.shape == (4, 3, 64)
    for layer, tokens in enumerate(outputs):
        torch.testing.assert_close(cls[:, layer], tokens[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean[:, layer], tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both, torch.cat([cls, mean], dim=-1))


@pytest.mark.parametrize("standardise", [False, True])
def test_each_probe_is_trained_as_if_alone(config, standardise):
    """The reference: one nn.Linear on one block's features, plain torch, the same batches and learning rates."""
    config = dataclasses.replace(config, standardise=standardise, batch_per_device=5)
    task, metrics = run(config)
    features, labels = task.cache.take(np.arange(48))
    torch.manual_seed(config.seed)
    Beit(MODEL.classifier(0))
    initial = LayerProbes(3, 64, 24)
    for layer in (0, 2):
        inputs = features[:, layer].double()
        if standardise:
            inputs = (inputs - inputs.mean(0)) / inputs.std(0, correction=0).clamp_min(1e-6)
        linear = nn.Linear(64, 24).double()
        with torch.no_grad():
            linear.weight.copy_(initial.weight[layer].T)
            linear.bias.zero_()
        optimizer = torch.optim.AdamW(linear.parameters(), weight_decay=1e-2)
        for step in range(12):
            epoch, within = divmod(step, 3)
            rows = torch.from_numpy(epoch_order(np.arange(16 * within, 16 * within + 16), 48, config.seed, epoch))
            optimizer.param_groups[0]["lr"] = learning_rate(step, config.optim, 12, 0)
            optimizer.zero_grad()
            nn.functional.cross_entropy(linear(inputs[rows]), labels[rows]).backward()
            optimizer.step()
        held_out, truth = task.validation_cache.take(np.arange(20))
        held_out = held_out[:, layer].double()
        if standardise:
            moments = features[:, layer].double()
            held_out = (held_out - moments.mean(0)) / moments.std(0, correction=0).clamp_min(1e-6)
        logits = linear(held_out)
        expected = 100 * (logits.argmax(1) == truth).double().mean()
        assert metrics[f"layer{layer + 1:02d}_top1_percent"] == pytest.approx(float(expected), abs=1e-6)
        trained = newest_checkpoint(config.output_dir / "checkpoints")[0]
        weights = dict(trained.tensors("model"))
        torch.testing.assert_close(weights["weight"][layer].double(), linear.weight.T.detach(), rtol=2e-3, atol=2e-4)


def test_the_best_layer_is_recomputed_image_by_image(config, tmp_path):
    """Logits that are the features themselves, in batches of 3; of layers that are equally good the first is best."""
    task, model = LinearProbe(config), LayerProbes(3, 4, 4)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4).expand(3, 4, 4))
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(13, 3, 4, generator=generator)
    labels = torch.randint(0, 4, (13,), generator=generator)
    features[torch.arange(5), 1, labels[:5]] += 1  # so that the second layer is better
    features[:, 2] = features[:, 1]
    batches = [FeatureBatch(features[i : i + 3], labels[i : i + 3]) for i in range(0, 13, 3)]
    right = [0, 0, 0]
    for rows, label in zip(features.tolist(), labels.tolist(), strict=True):
        for layer, row in enumerate(rows):
            right[layer] += row.index(max(row)) == label
    assert right[0] < right[1] == right[2] < 13
    alive = []
    task.world, task.alive, task.classes = CPU, lambda: alive.append(1), ["a", "b", "c", "d"]
    task.validation_loader, task._validation_batches = object(), lambda loader: iter(batches)
    percents = [100 * count / 13 for count in right]
    names = [f"layer{layer:02d}_top1_percent" for layer in (1, 2, 3)]
    expected = dict(zip(names, percents, strict=True)) | {"best_layer": 2, "best_top1_percent": percents[1]}
    assert task.evaluate(model, 0) == expected | {"validation_images": 13}
    assert len(alive) == len(batches)
    sums, loss = {}, 0.0
    for batch in batches:
        output = task.loss(model, batch, torch.tensor(13.0))
        loss += output.loss.item()
        for name, value in output.sums.items():
            sums[name] = sums.get(name, 0) + int(value)
    assert sums == {"correct_1": right[0], "correct_2": right[1], "correct_3": right[2], "images": 13}
    assert task.summarise(sums) == {"best_train_top1_percent": percents[1]}
    by_hand = [(row.logsumexp(0) - row[label]) for rows, label in zip(features, labels, strict=True) for row in rows]
    assert loss == pytest.approx(float(sum(by_hand)) / 13, rel=1e-5)
    task.finish(model, tmp_path)
    lines = "".join(f"{layer:02d}\t{value:.2f}\n" for layer, value in zip((1, 2, 3), percents, strict=True))
    assert (tmp_path / "layers.tsv").read_text() == "layer\ttop1_percent\n" + lines
    with safe_open(tmp_path / "probes.safetensors", "pt") as file:
        described = {"features": "cls+mean", "weights": "None", "classes": ["a", "b", "c", "d"]}
        assert json.loads(file.metadata()["probe"]) == described
        assert torch.equal(file.get_tensor("weight"), model.weight)
    task._validation_batches = lambda loader: iter(())
    with pytest.raises(ValueError, match="not one validation image could be used; bad files are named above"):
        task.evaluate(model, 0)


def test_the_features_are_computed_once(config, capsys):
    run(config)
    assert capsys.readouterr().out.count("features: ") == 2
    folder = config.output_dir / "features" / "training"
    before = np.load(folder / "features.npy")
    again = dataclasses.replace(config, steps=14, max_steps=None, output_dir=config.output_dir)
    task = LinearProbe(again)
    task.build(CPU)
    task.close()
    assert "features: " not in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(folder / "features.npy"), before)
    assert json.loads((folder / "complete.json").read_text())["features"] == "cls+mean"
    other = dataclasses.replace(config, seed=1)  # other weights
    task = LinearProbe(other)
    task.build(CPU)
    task.close()
    assert "features: " in capsys.readouterr().out
    assert not np.array_equal(np.load(folder / "features.npy"), before)


def test_with_augmentation_every_epoch_has_other_features(config):
    config = dataclasses.replace(config, augment=True, standardise=True, steps=3)
    task = LinearProbe(config)
    probes = task.build(CPU)
    requests = [requests_of(s, s + 1, 3, config, 0, 1) for s in (0, 3)]
    batches = [next(iter(task.batches(part))) for part in requests]
    order = [epoch_order(np.arange(16), 48, config.seed, epoch).tolist() for epoch in (0, 1)]
    assert [batch.indices.tolist() for batch in batches] == order
    prepared = task.prepare(batches[0], 0)
    features, labels = prepared.features, prepared.labels
    assert features.shape == (16, 3, 64)
    assert not features.requires_grad
    torch.testing.assert_close(labels, batches[0].labels)
    scaled = (task._features(torch.cat([b.images for b in task._evaluation_loader(task.training).batches(48)]))
              - probes.mean) / probes.std  # fmt: skip
    torch.testing.assert_close(scaled.mean(0), torch.zeros(3, 64), rtol=0, atol=1e-4)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(3, 64), rtol=0, atol=1e-3)
    task.close()


def test_unusable_images_are_left_out(config, tmp_path):
    root = write_class_folders(tmp_path / "data", ("ant", "bee"), 6, 6, seed=9)
    (root / "train" / "bee" / "3.jpg").write_bytes(b"no image")
    data = dataclasses.replace(config.data, path=str(root), max_bad_share=1.0)
    config = dataclasses.replace(config, data=data, batch_size=4, batch_per_device=4, steps=2)
    task, metrics = run(config)
    assert task.num_samples() == 11
    assert metrics["validation_images"] == 12
    assert sorted(set(range(12)) - set(task.used.tolist())) == [9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scratch": False, "data": LabelledDataConfig(path="x")}, "--weights is missing"),
        ({"weights": "x"}, "contradict"),
        ({"optim": OptimConfig(clip_grad=3.0)}, "--optim.clip-grad would tie the probes"),
    ],
)
def test_what_cannot_work_is_one_line(config, changes, message):
    with pytest.raises(ValueError, match=message):
        engine.run(LinearProbe(dataclasses.replace(config, **changes)))
