"""Segmentation: scores of scikit-learn, windows by brute force, exact resume, clear errors, two processes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from beit_fast.cli.main import main as commands
from beit_fast.data.segmentation import SegmentationImages, builtin_segmentation
from beit_fast.data.segmentation_loader import SegmentationBatch
from beit_fast.models import BeitConfig, BeitForMaskedImageModeling, BeitForSemanticSegmentation
from beit_fast.train import engine
from beit_fast.train.checkpoint.format import save_checkpoint
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.distributed.world import World
from beit_fast.train.evaluation.segmentors import open_segmentor
from beit_fast.train.tasks.segment import (
    CropConfig,
    Segment,
    SegmentationDataConfig,
    SegmentationEvaluationConfig,
    SegmentationModelConfig,
    SegmentConfig,
    head_flops,
)
from beit_fast.visualize.segmentations import coloured, overlay, palette

CPU = World(0, 1, torch.device("cpu"))
MODEL = SegmentationModelConfig(
    size="tiny", width=24, depth=3, num_heads=2, image_size=32, patch_size=8, drop_path_rate=0.3, channels=8,
    auxiliary_channels=8,
)  # fmt: skip
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def config(cache, tmp_path):
    return SegmentConfig(
        output_dir=tmp_path / "run",
        scratch=True,
        steps=4,
        batch_size=4,
        batch_per_device=4,
        data=SegmentationDataConfig(
            builtin_images=16, builtin_validation_images=5, builtin_size=48, cache_dir=cache, threads=1
        ),
        model=MODEL,
        crops=CropConfig(base=(48, 48), ratio=(0.7, 1.4)),
        evaluation=SegmentationEvaluationConfig(pictures=2),
        optim=OptimConfig(lr=1e-3, warmup_steps=1, clip_grad=None, eps=1e-3, schedule="poly"),
        checkpoint=CheckpointConfig(every_steps=2),
        log=LogConfig(every_steps=2, progress="none"),
    )


def train(config, **changes):
    config = dataclasses.replace(config, **changes)
    result = engine.run(Segment(config))
    assert result.exit_code == 0
    return BeitForSemanticSegmentation.from_pretrained(config.output_dir / "model"), result.metrics


def change(config, **fields):
    for name, value in fields.items():
        outer, _, inner = name.partition("__")
        value = dataclasses.replace(getattr(config, outer), **{inner: value}) if inner else value
        config = dataclasses.replace(config, **{outer: value})
    return config


# Runs.


@pytest.mark.parametrize("head", ["upernet", "setr_pup"])
def test_a_resumed_run_ends_with_the_same_weights(config, tmp_path, head):
    """Weights, running statistics and scores, bit for bit; dropout, drop path and distortion are on."""
    config = change(config, model__head=head)
    whole, metrics = train(config)
    part = dataclasses.replace(config, output_dir=tmp_path / "part", max_steps=2)
    assert engine.run(Segment(part)).step == 2
    resumed, again = train(config, output_dir=tmp_path / "part")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert again["mean_iou_percent"] == metrics["mean_iou_percent"]
    assert metrics["validation_images"] == 5
    assert 0 <= metrics["train_pixel_accuracy_percent"] <= 100


def test_a_run_folder_holds_what_it_is_read_for(config, capsys):
    train(config)
    folder = config.output_dir
    described = json.loads((folder / "model" / "preprocessing.json").read_text())
    assert described["classes"][0] == "ground"
    assert described["stride"] == 21
    assert "not comparable" in described["data"]
    table = [line.split("\t") for line in (folder / "per_class.tsv").read_text().splitlines()]
    assert table[0][:3] == ["class", "pixels", "iou_percent"]
    assert sum(int(row[1]) for row in table[1:]) == 5 * 48 * 48
    picture = Image.open(folder / "segmentations.png")
    assert picture.size[0] >= 3 * 240
    assert picture.size[1] >= 2 * 240
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"train_pixel_accuracy_percent", "images_per_s", "bad_images"} <= set(lines[0])
    assert "mean_iou_percent" in lines[-1]
    assert "segmentations.png" in capsys.readouterr().out


@pytest.mark.slow
def test_it_learns(config, cache):
    """Its loss falls below that of the best answer that is the same for every pixel: the entropy of the labels."""
    config = change(config, steps=120, data__builtin_size=32, crops__base=(32, 32), crops__ratio=(1.0, 1.0),
                    crops__photometric=False, model__drop_path_rate=0.0, layer_decay=1.0,
                    model__dropout=0.0, optim__lr=1e-2, optim__eps=1e-8, log__every_steps=10)  # fmt: skip
    train(config)
    data = builtin_segmentation(cache, 16, 32, train=True)
    labels = np.concatenate([np.asarray(Image.open(path)).ravel() for path in data.labels])
    shares = np.bincount(labels) / len(labels)
    entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[0] > 1.4 * entropy  # two heads, of which one counts 0.4
    assert losses[-1] < 0.85 * 1.4 * entropy


def test_layers_learn_at_their_rates(config):
    task = Segment(config)
    model = task.build(CPU)
    groups = task.parameter_groups(model, 0.05)
    task.close()
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    decay = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert scale.keys() == {name for name, _ in model.named_parameters()}
    assert scale["backbone.patch_embed.proj.weight"] == pytest.approx(0.9**4)
    assert scale["backbone.blocks.2.mlp.fc1.weight"] == pytest.approx(0.9)
    assert {scale[name] for name in scale if "fpn" in name or not name.startswith("backbone.")} == {1.0}
    assert decay["backbone.cls_token"] == decay["decode_head.bottleneck.bn.weight"] == 0.0
    assert decay["decode_head.bottleneck.conv.weight"] == decay["backbone.blocks.0.attn.qkv.weight"] == 0.05


def test_auxiliary_heads_count_by_their_weight(config):
    """The loss is that of the main head plus the weight times that of the other, over all pixels."""
    task = Segment(config)
    model = task.build(CPU).eval()
    task.close()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 11, (2, 32, 32), generator=generator)
    batch = SegmentationBatch(
        torch.randn(2, 3, 32, 32, generator=generator), labels, torch.tensor([1, 2]), torch.tensor([0, 1])
    )
    model.train()
    state = torch.get_rng_state()
    found = task.loss(model, batch, torch.tensor(2048.0))
    torch.set_rng_state(state)
    logits = model(batch.images, batch.sample_keys)
    losses = [
        F.cross_entropy(F.interpolate(s, size=(32, 32), mode="bilinear"), labels, ignore_index=-1, reduction="none")
        for s in (logits.main, *logits.auxiliary)
    ]
    assert found.loss.item() == pytest.approx((losses[0].mean() + 0.4 * losses[1].mean()).item(), rel=1e-5)
    assert int(found.sums["num_counted"]) == int((labels >= 0).sum())
    assert task.num_targets(batch) == 2048


def pretrained():
    torch.manual_seed(7)
    config = BeitConfig.from_preset("tiny", "plus", width=24, depth=3, num_heads=2, image_size=32, patch_size=8,
                                    vocab_size=50)  # fmt: skip
    return BeitForMaskedImageModeling(config)


def test_segmentation_starts_where_it_is_told(config, tmp_path):
    source = pretrained()
    save_checkpoint(tmp_path / "checkpoints", 1, {"model": source.state_dict()}, {}, keep=2)
    started = dataclasses.replace(config, scratch=False, weights=str(tmp_path))
    task = Segment(started)
    model = task.build(CPU)
    task.close()
    assert torch.equal(model.backbone.patch_embed.proj.weight, source.patch_embed.proj.weight)
    assert torch.equal(model.backbone.blocks[2].mlp.fc2.weight, source.blocks[2].mlp.fc2.weight)


# What goes wrong.


def folder_of(root, training=6, validation=3, number=lambda index: index % 3):
    for split, count in (("training", training), ("validation", validation)):
        for index in range(count):
            image = root / "images" / split / f"{index}.jpg"
            label = root / "annotations" / split / f"{index}.png"
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(image)
            Image.fromarray(np.full((40, 50), number(index), np.uint8)).save(label)
    return str(root)


def test_folders_train_and_validate(config, tmp_path):
    data = folder_of(tmp_path / "data")
    _, metrics = train(change(config, data__path=data, data__num_classes=3))
    assert metrics["validation_images"] == 3


def test_nothing_but_ignored_pixels_is_refused(config, tmp_path):
    data = folder_of(tmp_path / "data", number=lambda index: 255)
    ignored = change(config, data__path=data, data__num_classes=3)
    with pytest.raises(ValueError, match=r"annotations/training: 6 label maps: 100\.0 % of the pixels ignored; 3 of 3"):
        engine.run(Segment(ignored))


def test_nothing_but_ignored_pixels_is_a_loss_of_zero(config, tmp_path, monkeypatch):
    monkeypatch.setattr(SegmentationImages, "check_labels", lambda images, seed: None)
    data = folder_of(tmp_path / "data", number=lambda index: 255)
    ignored = change(config, data__path=data, data__num_classes=3, data__validate=False)
    _, metrics = train(ignored)
    assert metrics["loss"] == 0.0
    assert metrics["skipped_steps"] == 0
    assert metrics["train_pixel_accuracy_percent"] == 0.0
    validated = change(ignored, data__validate=True, output_dir=tmp_path / "other")
    with pytest.raises(ValueError, match="not one labelled pixel"):
        engine.run(Segment(validated))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scratch": False, "data__path": "DATA"}, "--weights is missing"),
        ({"weights": "x"}, "--weights and --scratch contradict"),
        ({"auxiliary_weight": -1.0}, "--auxiliary-weight must be at least 0"),
        ({"data__path": "DATA"}, "the number of classes is unknown; give --data.num-classes"),
        ({"data__path": "DATA", "data__num_classes": 2}, r"label 2 at row 0, column 0 is none of the 2 classes"),
        ({"data__path": "DATA/nowhere"}, "no such folder"),
        ({"data__path": "DATA/images"}, "no training images with labels"),
        ({"batch_per_device": 1}, "UPerNet's batch norms need two images at once, .* raise --batch-per-device"),
        ({"layer_decay": 0.0}, "--layer-decay must be in"),
        ({"scratch": False, "weights": "nothing.pth"}, "nothing.pth: no such file or folder"),
        ({"batch_size": 64}, "lower --batch-size"),
        ({"crops__cat_max_ratio": 0.0}, "cat_max_ratio must be in"),
        ({"evaluation__stride": 40}, r"a stride in \[1, window\]"),
        ({"model__channels": 0}, "channels must be positive"),
    ],
)
def test_what_cannot_work_is_one_line(config, tmp_path, changes, message):
    data = folder_of(tmp_path / "data")
    changes = {k: v.replace("DATA", data) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message) as error:
        engine.run(Segment(change(config, **changes)))
    assert "\n" not in str(error.value)


def test_data_that_is_not_split_has_no_validation(config, tmp_path):
    root = tmp_path / "data"
    folder_of(root)
    for kind in ("images", "annotations"):
        (root / kind / "training").rename(root / f"{kind}.new")
        for path in sorted((root / kind).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (root / kind).rmdir()
        (root / f"{kind}.new").rename(root / kind)
    changed = change(config, data__path=str(root), data__num_classes=3)
    with pytest.raises(ValueError, match=r"is not split into train and val, .* give --data.no-validate"):
        engine.run(Segment(changed))


def test_setr_may_train_one_image_at_a_time(config):
    train(change(config, model__head="setr_pup", batch_per_device=1, steps=1, data__validate=False))


def test_flops_of_the_heads():
    """By hand for SETR-PUP: convolutions of 3 x 3 at 4, 8, 16, 32 and at 4, 16 pixels a side, then classifiers."""
    config = dataclasses.replace(MODEL, head="setr_pup").segmentor(13)
    main = 9 * (24 * 8 * 16 + 8 * 8 * (64 + 256 + 1024)) + 8 * 13 * 64**2
    auxiliary = 9 * (24 * 8 * 16 + 8 * 8 * 256) + 8 * 13 * 64**2
    assert head_flops(config) == 2 * (main + 3 * auxiliary)


# Opening and colouring.


def test_a_run_is_opened_and_colours_images(config, tmp_path, capsys):
    train(config)
    opened = open_segmentor(config.output_dir)
    assert opened.classes[0] == "ground"
    assert opened.inference == dataclasses.replace(config.inference(), windows_per_batch=8)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one.png")
    (tmp_path / "two.png").write_bytes(b"nothing")
    words = ["segment", str(config.output_dir), str(tmp_path / "one.png"), "--output-dir", str(tmp_path / "out"),
             "--device", "cpu", "--opacity", "0.5"]  # fmt: skip
    assert commands(words) == 0
    output = capsys.readouterr().out
    found = opened.inference.classes(opened.model, torch.from_numpy(pixels)).numpy()
    expected = np.rint(0.5 * pixels + 0.5 * coloured(found, 11)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out" / "one_segments.png")), expected)
    legend = np.asarray(Image.open(tmp_path / "out" / "one_legend.png").convert("RGB")).reshape(-1, 3)
    assert all((legend == palette(11)[number]).all(1).sum() >= 13 * 13 for number in np.unique(found))
    top = int(np.bincount(found.ravel(), minlength=11).argmax())
    assert f"% {opened.classes[top]}" in output
    assert commands([*words[:3], str(tmp_path / "two.png"), *words[3:]]) == 1
    assert "two.png: unknown format" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        commands(["segment", str(config.output_dir)])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        commands(["segment", str(tmp_path / "nothing"), "x.png"])
    assert stop.value.code == 1


@pytest.mark.parametrize("head", ["upernet", "setr_pup"])
def test_files_of_mmsegmentation_are_opened(tmp_path, head):
    torch.manual_seed(0)
    source = BeitForSemanticSegmentation(dataclasses.replace(MODEL, head=head).segmentor(5)).eval()
    torch.save({"state_dict": source.state_dict(), "meta": {}}, tmp_path / "released.pth")
    opened = open_segmentor(tmp_path / "released.pth")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(opened.model.predict(x), source.predict(x))
    assert opened.classes == ("0", "1", "2", "3", "4")
    assert (opened.inference.window, opened.inference.stride, opened.inference.base) == (
        32,
        21,
        (128, 32),
    )
    torch.save(pretrained().state_dict(), tmp_path / "pretrained.pth")
    with pytest.raises(ValueError, match="holds no segmentation head"):
        open_segmentor(tmp_path / "pretrained.pth")


def test_colours_are_distinct():
    colours = palette(150)
    assert len({tuple(c) for c in colours.tolist()}) == 150
    pixels = np.full((2, 2, 3), 100, np.uint8)
    shown = overlay(pixels, np.array([[0, 1], [2, -1]]), 3, 1.0)
    assert shown[0, 0].tolist() == colours[0].tolist()
    assert shown[1, 1].tolist() == [90, 90, 90]
    assert overlay(pixels, np.array([[0, 1], [2, -1]]), 3, 0.0).tolist() == pixels.tolist()


@pytest.mark.slow
def test_two_processes_train_what_one_does(cache, tmp_path):
    """The recipe under torchrun: batch norms over both processes, every validation image counted once."""
    recipe = Path(__file__).parents[3] / "recipes" / "segment_ade20k_base.py"
    options = (
        "--model.width 16 --model.depth 2 --model.num-heads 2 --model.image-size 32 --model.patch-size 8 "
        "--model.channels 8 --crops.base 48 48 --crops.ratio 1 1 "
        f"--data.builtin-size 48 --data.builtin-images 16 --data.builtin-validation-images 5 --data.cache-dir {cache} "
        "--batch-size 8 --batch-per-device 8 --steps 3 --device cpu --log.progress none --optim.eps 1e-3 "
        "--model.dropout 0 --optim.lr 1e-2"
    ).split()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["OMP_NUM_THREADS"] = "1"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in (("one", [sys.executable]), ("two", launch)):
        command = [*start, str(recipe), *options, "--output-dir", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    models = [BeitForSemanticSegmentation.from_pretrained(tmp_path / name / "model") for name in ("one", "two")]
    one, two = (model.state_dict() for model in models)
    start = BeitForSemanticSegmentation(models[0].config).state_dict()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=5e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert not torch.allclose(start["decode_head.bottleneck.bn.running_mean"],
                              one["decode_head.bottleneck.bn.running_mean"])  # fmt: skip
    measured = [json.loads((tmp_path / name / "model" / "preprocessing.json").read_text())["measured"]
                for name in ("one", "two")]  # fmt: skip
    assert measured[0]["validation_images"] == measured[1]["validation_images"] == 5
    assert measured[0]["pixel_accuracy_percent"] == pytest.approx(measured[1]["pixel_accuracy_percent"], abs=0.5)
