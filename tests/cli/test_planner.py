"""Plans: what needs neither images nor weights, and a GPU that is not here, from what was measured or estimated."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest

from beit_fast.cli import gpus, plan, train
from beit_fast.cli.plan import on_gpu
from beit_fast.models import BeitConfig
from beit_fast.train.tasks.model import multiply_adds
from beit_fast.train.tasks.pretrain import ModelConfig, PretrainConfig
from beit_fast.train.tasks.probe import ProbeConfig
from tests.docs.toy import BACKBONE, TOY

ROOT = Path(__file__).parents[2]
NUMBERS = {
    "activation_bytes_per_sample": 2e9, "state_bytes": 6e9, "flops_per_image": 300e9, "tokenizer_flops_per_image": 50e9,
    "steps": 1000,
}  # fmt: skip


def config(size="large", gpu="H100", **changes):
    values = {"batch_size": 2048, "plan_gpu": gpu, "gpus": 8, "model": ModelConfig(size=size, width=1024)}
    return PretrainConfig(**{**values, **changes})


def test_time_and_memory_of_a_named_gpu():
    (_, time), (_, batch) = on_gpu(config(), NUMBERS, "images")
    # not of a size that was measured: 0.349 x 989e12 / 350e9 = 986 images/s on each of 8; 2,048,000 images take 260 s
    assert "986 images/s each (estimate: 35 % of 989 TFLOP/s, the share measured on an H100 in pre-training of " in time
    assert time.startswith("4 min 20 s")
    # 0.94 x 79.1 GiB - 6e9 = 73.8e9 bytes at 1e9 per sample (bf16 halves what fp32 took here)
    assert batch.startswith("--batch-per-device 72 of 79 GiB")
    (_, (_, split)) = on_gpu(config(parallel="fsdp2", precision="fp32"), NUMBERS, "images")
    assert split.startswith("--batch-per-device 32")  # (79.8e9 - 0.75e9) / 2e9 = 39


def test_only_fsdp2_shares_the_state_between_gpus():
    """79.8e9 bytes less 16e9, or less an eighth of them, at 1e9 a sample: 63 and 77, of which multiples of 8."""
    numbers = NUMBERS | {"state_bytes": 16e9}
    assert on_gpu(config(), numbers, "images")[1][1].startswith("--batch-per-device 56 ")
    assert on_gpu(config(parallel="fsdp2"), numbers, "images")[1][1].startswith("--batch-per-device 72 ")


def test_an_estimate_is_a_share_of_the_peak(monkeypatch):
    """70 % of 989e12 FLOP/s at 300e9 an image, where nothing else is known; nothing where no FLOPs are."""
    nearest = dataclasses.replace(gpus.MEASUREMENTS[0], share=0.7)
    monkeypatch.setattr(plan, "nearest_measurement", lambda work, width, batch: nearest)
    alone = {name: value for name, value in NUMBERS.items() if name != "tokenizer_flops_per_image"}
    time = on_gpu(config(), alone, "images")[0][1]
    assert "2,308 images/s each (estimate: 70 % of 989 TFLOP/s, the share" in time
    assert on_gpu(config(), {name: alone[name] for name in alone if "flops" not in name}, "images") == [
        ("on 8 x H100", "no FLOPs are known of this task, so no time can be said")
    ]


def test_what_was_measured_takes_the_place_of_the_estimate():
    (_, time), _ = on_gpu(config(model=ModelConfig(size="large")), NUMBERS, "images")
    assert "812 images/s each (measured at batch 128, without the input pipeline: 2026-11-26_nvidia-h100" in time
    for changed in (ModelConfig(size="large", preset="plain"), ModelConfig(size="large", image_size=384)):
        assert "estimate" in on_gpu(config(model=changed), NUMBERS, "images")[0][1]
    assert "estimate" in on_gpu(config(gpu="H200", model=ModelConfig(size="large")), NUMBERS, "images")[0][1]


def test_a_frozen_backbone_is_planned_as_inference():
    probe = ProbeConfig(plan_gpu="A100-80GB", scratch=True, optim=runpy_config("linear_probe").optim)
    numbers = {**NUMBERS, "flops_per_image": 35e9, "forward_flops_per_image": 35e9, "tokenizer_flops_per_image": 0.0}
    assert "40 % of 312 TFLOP/s, the share measured on an H100 in inference" in on_gpu(probe, numbers, "images")[0][1]


def test_the_measurements_are_those_of_the_record():
    """Images per second, and their FLOPs as plans count them, over the peak of the data sheet."""
    groups = {
        "pre-training": "pre-training, whole step with DALL-E's tokenizer", "training": "backbone, training step",
        "inference": "backbone, inference",
    }  # fmt: skip
    for measured in gpus.MEASUREMENTS:
        record = json.loads((ROOT / "benchmarks" / "records" / measured.record).read_text())
        start = f"{groups[measured.work]}: BEiT-{measured.size} plus, 224 px, B={measured.batch}, bfloat16"
        (entry,) = [e for e in record["benchmarks"] if e["group"] == start and "beit_fast" in e["extra_info"].values()]
        assert measured.images_per_s == pytest.approx(entry["extra_info"]["images_per_s"], rel=1e-3)
        architecture = BeitConfig.from_preset(measured.size)
        assert measured.width == architecture.width
        flops = {
            "pre-training": 6 * multiply_adds(architecture, 75) + 2 * 26.06e9,  # paper's tokenizer at 112 px
            "training": 6 * multiply_adds(architecture), "inference": 2 * multiply_adds(architecture),
        }[measured.work]  # fmt: skip
        share = measured.images_per_s * flops / gpus.named(measured.gpu).peak_flops_per_s
        assert measured.share == pytest.approx(share, rel=5e-3)


def test_the_nearest_measurement_is_that_of_the_nearest_width():
    assert gpus.nearest_measurement("inference", 384, 1).size == "base"
    assert gpus.nearest_measurement("inference", 1280, 256).size == "large"
    assert gpus.nearest_measurement("training", 1024, 64).size == "base"  # the only one of its kind


def test_unknown_gpus_are_answered_with_the_list():
    with pytest.raises(ValueError, match="--plan-gpu H900 is not known; choose from V100"):
        gpus.named("H900")


def runpy_config(name):
    return runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["config"]


SMALL = (
    "--device", "--data.threads", "--model.channels", "--model.auxiliary-channels", "--crops.base",
    "--masking.num-masked", "--masking.min-num-patches", "--hidden-dim", "--vocab-size", "--quantizer.live-codes",
    "--evaluation.images", "--objective.early-layers", "--teacher.name", "--model.decoder-depth", "--model.vocab-size",
    "--model.code-dim",
)  # fmt: skip
FOR_BUILTIN_IMAGES = (
    "train_tokenizer", "train_tokenizer_vqkd_tiny_builtin", "pretrain_tiny_builtin", "pretrain_beitv2_tiny_builtin",
    "pretrain_own_images",
)  # fmt: skip
"""Recipes that are for no data set with a name."""
QUICK = ("finetune_imagenet_base", "linear_probe", "pretrain_beit_base", "segment_ade20k_base")
RECIPES = [
    path.stem if path.stem in QUICK else pytest.param(path.stem, marks=pytest.mark.slow)
    for path in sorted((ROOT / "recipes").glob("*.py"))
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the built-in images are drawn, once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_planned_without_images_and_weights(name, tmp_path, cache, monkeypatch, capsys):
    """At toy size, which --model options give; batch, length, data and tokenizer are the recipe's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BEIT_FAST_CACHE", str(cache))
    own = runpy_config(name)
    toy = TOY[type(own).__name__]
    kept = {*BACKBONE, *SMALL}
    options = {option: value for option, value in toy.items() if option in kept}
    if hasattr(own, "tokenizer"):
        options["--tokenizer.name"] = "demo"
    if name in FOR_BUILTIN_IMAGES:
        options["--data.builtin-images"] = "64"
    words = [word for option, value in options.items() for word in (option, *value.split())]
    module = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))
    made = {}
    monkeypatch.setattr(train.engine, "run", lambda task: made.setdefault("trained", True))
    monkeypatch.setattr("sys.argv", [f"beit-fast train {name}", *words, "--dry-run", "--plan-gpu", "H100"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr()
    assert not stop.value.code, out.err
    assert "trained" not in made
    assert f"of a schedule of {expected_steps(module['config']):,}" in out.out
    assert re.search(rf"^  batch +{own.batch_size} = ", out.out, re.M)
    assert "on 1 x H100" in out.out


def expected_steps(own):
    """By hand: images of the data set that the recipe is for, its batch, its epochs."""
    if own.steps is not None:
        return own.steps
    classes = getattr(own.data, "num_classes", None)
    images = {None: 1_281_167, 1000: 1_281_167, 21841: 14_197_122, 100: 50_000}[classes]
    if hasattr(own, "tokenizer") and own.data.normalization == "half":
        images = 14_197_122
    return round(own.epochs * (images // own.batch_size))


def test_dalles_tokenizer_is_planned_without_its_weights(tmp_path, cache, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BEIT_FAST_CACHE", str(cache))
    words = "--dry-run --device cpu --data.threads 1 --model.width 32 --model.depth 1 --model.num-heads 2"
    monkeypatch.setattr("sys.argv", ["beit-fast train pretrain_beit_base", *words.split()])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "recipes" / "pretrain_beit_base.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert not stop.value.code
    assert "tokenizer FLOPs per image  52.12e9" in out
    assert "of the data that the recipe is for; built-in images stand in" in out
    assert " frozen" in out
