"""Fine-tuning: independent of the split, resumable, evaluated as timm and torchvision do, clear when it cannot work."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beit_fast.data.classification import EvaluationLoader
from beit_fast.data.labelled import builtin_labelled
from beit_fast.data.loader import Request
from beit_fast.models import Beit, BeitConfig, BeitForMaskedImageModeling, convert_state_dict
from beit_fast.train import engine
from beit_fast.train.checkpoint.format import save_checkpoint
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.distributed.world import World
from beit_fast.train.evaluation.classification import Evaluation, evaluate_classifier
from beit_fast.train.evaluation.segmentation import SegmentationScores
from beit_fast.train.tasks.finetune import (
    AugmentConfig,
    ClassifierModelConfig,
    Finetune,
    FinetuneConfig,
    LabelledDataConfig,
)
from beit_fast.train.tasks.weights import load_weights, resolve_weights
from benchmarks.baselines.torchvision_stubs import make_torchvision_importable
from tests.images import write_class_folders
from tests.train.summing_rank import Rank

make_torchvision_importable()

CPU = World(0, 1, torch.device("cpu"))
MODEL = ClassifierModelConfig(
    size="tiny", width=32, depth=2, num_heads=2, image_size=32, patch_size=8, drop_path_rate=0.3, init_std=0.1
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def config(cache, tmp_path):
    return FinetuneConfig(
        output_dir=tmp_path / "run",
        scratch=True,
        steps=4,
        batch_size=8,
        batch_per_device=8,
        data=LabelledDataConfig(
            builtin_images=32, builtin_validation_images=24, builtin_size=32, cache_dir=cache, threads=1
        ),
        model=MODEL,
        augment=AugmentConfig(repeats=3),
        optim=OptimConfig(lr=1e-2, warmup_steps=1, clip_grad=None, eps=1e-3),
        checkpoint=CheckpointConfig(every_steps=2),
        log=LogConfig(every_steps=2, progress="none"),
    )


def train(config, **changes):
    """Trains and returns the classifier's parameters and the last metrics."""
    config = dataclasses.replace(config, **changes)
    result = engine.run(Finetune(config))
    assert result.exit_code == 0
    model = Beit.from_pretrained(config.output_dir / "model")
    return {name: p.detach() for name, p in model.named_parameters()}, result.metrics


def test_the_split_into_micro_batches_does_not_matter(config, tmp_path):
    """Repeated augmentation, RandAugment, erasing, mixup, CutMix and drop path are all on."""
    whole, metrics = train(config)
    parts, again = train(config, batch_per_device=2, output_dir=tmp_path / "parts")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=2e-5, msg=name)
    assert again["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert metrics["validation_images"] == 24


def test_a_resumed_run_ends_with_the_same_weights(config, tmp_path):
    optim = dataclasses.replace(config.optim, ema_decay=0.5)
    config = dataclasses.replace(config, optim=optim)
    whole, metrics = train(config)
    part = dataclasses.replace(config, output_dir=tmp_path / "part", max_steps=2)
    assert engine.run(Finetune(part)).step == 2
    resumed, again = train(config, output_dir=tmp_path / "part")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert again["top1_percent"] == metrics["top1_percent"]


def test_the_averaged_weights_are_the_ones_evaluated_and_exported(config, tmp_path):
    """With a decay of 1 the average stays at the initial weights, whatever the training does."""
    optim = dataclasses.replace(config.optim, ema_decay=1.0)
    averaged, _ = train(config, optim=optim)
    torch.manual_seed(config.seed)
    initial = Beit(MODEL.classifier(24)).named_parameters()
    assert all(torch.equal(averaged[name], value) for name, value in initial)


def test_a_run_folder_holds_what_it_is_read_for(config):
    train(config)
    folder = config.output_dir
    described = json.loads((folder / "model" / "preprocessing.json").read_text())
    assert described["classes"][0] == "stripes disk"
    assert described["crop_share"] == 0.875
    assert "not comparable to ImageNet" in described["data"]
    table = [line.split("\t") for line in (folder / "per_class.tsv").read_text().splitlines()]
    assert table[0][:3] == ["class", "images", "top1_percent"]
    assert sum(int(row[1]) for row in table[1:]) == 24
    assert Image.open(folder / "confusion.png").size[0] > 500
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"train_top1_percent", "images_per_s", "data_wait_share", "bad_images"} <= set(lines[0])


def test_tables_hold_class_names_that_are_no_utf8(tmp_path):
    """The bytes of the folders' names, from both kinds of scores; pictures draw what they can."""
    texts = ("狗", "gbk"), ("犬", "shift_jis"), ("개", "euc-kr"), ("Grüße", "latin1")
    names = [text.encode(encoding) for text, encoding in texts]
    classes, ones = tuple(os.fsdecode(name) for name in names), np.ones(4, np.int64)
    for scores in (Evaluation(classes, ones, ones, ones, 0.0, np.eye(4, dtype=np.int64)[::-1].copy()),
                   SegmentationScores(classes, np.eye(4, dtype=np.int64), 1)):  # fmt: skip
        table = scores.write(tmp_path)[0].read_bytes()
        assert {line.split(b"\t")[0] for line in table.splitlines()[1:]} == set(names)


def test_partners_are_those_of_the_global_batch(config):
    task = Finetune(config)
    task.build(CPU)
    task.close()
    request = task._paired(Request(1, np.arange(8, 16)))
    assert request.epoch == 1
    assert request.positions.tolist() == [8, 15, 9, 14, 10, 13, 11, 12]
    assert task._paired(Request(0, np.arange(4, 8))).positions.tolist() == [2, 5, 3, 4]


def test_compiled_and_plain_parameters_have_the_same_names(config):
    """torch.compile is applied in place, so checkpoints do not depend on it (compiling itself needs a C++ compiler)."""
    compiled = dataclasses.replace(MODEL, compile="default")
    changed = dataclasses.replace(config, model=compiled)
    task = Finetune(changed)
    model = task.build(CPU)
    task.close()
    assert set(model.state_dict()) == set(Beit(MODEL.classifier(24)).state_dict())
    assert model._compiled_call_impl is not None


def pretrained(**values):
    torch.manual_seed(7)
    config = BeitConfig.from_preset("tiny", "plus", width=32, depth=2, num_heads=2, image_size=32, patch_size=8,
                                    vocab_size=50, **values)  # fmt: skip
    model = BeitForMaskedImageModeling(config)
    with torch.no_grad():
        model.rel_pos_bias.relative_position_bias_table.normal_()
    return model


def test_a_run_folder_of_pretraining_is_a_start(tmp_path):
    """The shared table goes to every block; at another size it is resized; the newest sound checkpoint counts."""
    source = pretrained()
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, {"model": source.state_dict()}, {}, keep=2)
    newest = resolve_weights(tmp_path)
    assert newest.name == "step_00000002"
    (newest / "model.safetensors").write_bytes(b"damaged")
    assert resolve_weights(tmp_path).name == "step_00000001"
    model = Beit(MODEL.classifier(24))
    report = load_weights(model, tmp_path, verbose=False)
    table = source.rel_pos_bias.relative_position_bias_table
    for block, theirs in zip(model.blocks, source.blocks, strict=True):
        assert torch.equal(block.attn.relative_position_bias_table, table)
        assert torch.equal(block.mlp.fc1.weight, theirs.mlp.fc1.weight)
    assert len(report.expanded) == 2
    larger = Beit(dataclasses.replace(MODEL, image_size=64).classifier(24))
    load_weights(larger, tmp_path, verbose=False)
    assert larger.blocks[0].attn.relative_position_bias_table.shape == (15 * 15 + 3, 2)


def test_fine_tuning_starts_where_it_is_told(config, tmp_path):
    source = pretrained()
    save_checkpoint(tmp_path / "checkpoints", 1, {"model": source.state_dict()}, {}, keep=2)
    started = dataclasses.replace(config, scratch=False, weights=str(tmp_path))
    task = Finetune(started)
    model = task.build(CPU)
    task.close()
    assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight)
    assert model.head.weight.abs().max() < 1e-2


@pytest.fixture(scope="module")
def classifier():
    """A classifier whose answers differ from image to image and are far from ties."""
    torch.manual_seed(3)
    model = Beit(MODEL.classifier(24))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def test_evaluation_is_timms(classifier, cache):
    """200 images: timm's model under torchvision's transforms on Pillow images gives the same top-1 and top-5."""
    peers = pytest.importorskip("benchmarks.baselines.libraries")
    transforms = pytest.importorskip("torchvision.transforms")
    pytest.importorskip("timm")
    images = builtin_labelled("scenes", cache, 200, 48, train=False)
    half = (0.5, 0.5, 0.5)
    views = EvaluationLoader(images.source, images.labels, image_size=32, mean=half, std=half, threads=1)
    ours = evaluate_classifier(classifier, views, images.classes, 64, CPU)
    views.close()
    timm = peers.timm_beit(classifier.config)
    timm.load_state_dict(convert_state_dict(classifier.state_dict(), to="timm"))
    timm.eval()
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.Resize(int(32 / 0.875), bicubic), transforms.CenterCrop(32), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(half, half)])
    pixels = torch.stack([transform(Image.open(images.source.name(i)).convert("RGB")) for i in range(200)])
    with torch.no_grad():
        logits = timm(pixels)
    labels = torch.from_numpy(images.labels)
    assert len(logits.argmax(1).unique()) > 5
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).sum()
    metrics = ours.metrics()
    assert metrics["top1_percent"] == 100 * (logits.argmax(1) == labels).float().mean()
    assert metrics["top5_percent"] == 100 * top5 / 200
    assert metrics["validation_loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-3
    )


def test_ranks_count_every_image_once(classifier, cache):
    images = builtin_labelled("scenes", cache, 23, 48, train=False)

    def evaluate(world):
        views = EvaluationLoader(images.source, images.labels, image_size=32, threads=1)
        try:
            return evaluate_classifier(classifier, views, images.classes, 4, world)
        finally:
            views.close()

    alone = evaluate(CPU)
    totals = []
    results = [evaluate(Rank(rank, 3, totals)) for rank in range(3)]
    assert alone.images.sum() == 23
    for name in ("images", "top1", "top5", "confusion"):
        np.testing.assert_array_equal(getattr(results[-1], name), getattr(alone, name))
    assert results[-1].loss == pytest.approx(alone.loss)
    np.testing.assert_array_equal(alone.confusion.sum(1), alone.images)
    np.testing.assert_array_equal(alone.confusion.diagonal(), alone.top1)


def test_the_table_names_what_a_class_is_taken_for(tmp_path):
    confusion = np.array([[3, 1, 0], [0, 0, 4], [0, 0, 0]])
    found = Evaluation(
        ("ant", "bee", "cat"), np.array([4, 4, 0]), np.array([3, 0, 0]), np.array([4, 4, 0]), 1.0, confusion
    )
    paths = found.write(tmp_path)
    assert (tmp_path / "per_class.tsv").read_text().splitlines()[1:] == [
        "bee\t4\t0.00\t100.00\tcat (4)",
        "ant\t4\t75.00\t100.00\tbee (1)",
    ]
    assert all(path.exists() for path in paths)
    assert found.metrics()["top1_percent"] == 37.5


def folders(root, classes):
    return str(write_class_folders(root, classes, 4, 2))


def test_folders_train_and_validate(config, tmp_path):
    data = dataclasses.replace(config.data, path=folders(tmp_path / "data", ["ant", "bee"]), num_classes=2)
    _, metrics = train(config, data=data, batch_size=4, batch_per_device=4)
    assert metrics["validation_images"] == 4
    assert metrics["top5_percent"] == 100.0


def change(config, **fields):
    for name, value in fields.items():
        outer, _, inner = name.partition("__")
        value = dataclasses.replace(getattr(config, outer), **{inner: value}) if inner else value
        config = dataclasses.replace(config, **{outer: value})
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scratch": False, "data__path": "DATA"}, "--weights is missing"),
        ({"weights": "x"}, "--weights and --scratch contradict"),
        ({"data__path": "DATA", "data__num_classes": 1000}, "has 2 classes, but --data.num-classes is 1000"),
        ({"data__path": "DATA/train/ant"}, "have no label"),
        ({"data__path": "DATA", "data__validation_path": "DATA/train/ant"}, "have no label"),
        ({"data__path": "DATA/val"}, "no validation images: .* --data.validation-path, or --data.no-validate"),
        ({"data__path": "nowhere"}, "no such folder: nowhere"),
        ({"batch_size": 9, "batch_per_device": 3}, "--batch-size 9 on 1 processes x 3 .* of 3 to 3 images"),
        ({"batch_size": 6, "batch_per_device": 4}, "leaves one without a partner"),
        ({"augment__smoothing": 1.0}, "--augment.smoothing must be"),
        ({"layer_decay": 0.0}, "--layer-decay must be in"),
        ({"scratch": False, "weights": "nothing.pth"}, "nothing.pth: no such file or folder"),
        ({"batch_size": 64}, "lower --batch-size"),
        ({"augment__rand_augment": 12.0}, "magnitude must be in"),
    ],
)
def test_what_cannot_work_is_one_line(config, tmp_path, changes, message):
    data = folders(tmp_path / "data", ["ant", "bee"])
    changes = {k: v.replace("DATA", data) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message) as error:
        engine.run(Finetune(change(config, **changes)))
    assert "\n" not in str(error.value)


def test_a_run_folder_without_a_checkpoint_says_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="is a run folder without a sound checkpoint"):
        resolve_weights(tmp_path)
    assert resolve_weights(Path("x.pth")) == Path("x.pth")


@pytest.mark.slow
def test_two_processes_train_what_one_does(cache, tmp_path):
    """The recipe under torchrun: the same batch over two processes, every validation image counted once."""
    recipe = Path(__file__).parents[3] / "recipes" / "finetune_imagenet_base.py"
    options = (
        f"--model.width 32 --model.depth 2 --model.num-heads 2 --model.image-size 32 --model.patch-size 8 "
        f"--data.builtin-size 32 --data.builtin-images 32 --data.builtin-validation-images 23 --data.cache-dir {cache} "
        "--batch-size 8 --batch-per-device 2 --steps 4 --device cpu --log.progress none --optim.eps 1e-3"
    ).split()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["OMP_NUM_THREADS"] = "1"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in (("one", [sys.executable]), ("two", launch)):
        command = [*start, str(recipe), *options, "--output-dir", str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    one, two = (Beit.from_pretrained(tmp_path / name / "model") for name in ("one", "two"))
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=name)
    measured = [json.loads((tmp_path / name / "model" / "preprocessing.json").read_text())["measured"]
                for name in ("one", "two")]  # fmt: skip
    assert measured[0]["validation_images"] == measured[1]["validation_images"] == 23
    assert measured[0]["top1_percent"] == pytest.approx(measured[1]["top1_percent"], abs=100 / 23 + 1e-6)


gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@gpu
@needs_gpu
def test_the_gpu_makes_the_same_batches(config):
    tasks = {device: Finetune(config) for device in ("cpu", "cuda")}
    found = {}
    for device, task in tasks.items():
        task.build(World(0, 1, torch.device(device)))
        batch = next(iter(task.batches(iter([Request(0, np.arange(8))]))))
        batch = task.prepare(batch, 1)
        assert batch.images.device.type == device
        values = (batch.images, batch.labels, batch.sample_keys, batch.label_weight)
        found[device] = [value.cpu() for value in values]
        task.close()
    torch.testing.assert_close(found["cuda"][0], found["cpu"][0], rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(found["cuda"][1:], found["cpu"][1:], strict=True):
        torch.testing.assert_close(ours, theirs)


@gpu
@needs_gpu
@pytest.mark.parametrize("how", ["none", "default", "cuda-graph"])
def test_the_gpu_trains_what_the_cpu_does(config, tmp_path, how):
    on_cpu, _ = train(config, precision="fp32", device="cpu")
    model = dataclasses.replace(MODEL, compile=how)
    on_gpu, metrics = train(config, precision="fp32", device="cuda", model=model, output_dir=tmp_path / "gpu")
    for name, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[name].cpu(), value, rtol=2e-2, atol=2e-3, msg=name)
    assert metrics["validation_images"] == 24
