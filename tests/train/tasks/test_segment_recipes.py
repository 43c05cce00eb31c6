"""The recipes for segmentation: the official values, and each one run to its end with a tiny model."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from beit_fast.cli.demo import demo_of
from beit_fast.cli.train import main
from beit_fast.train.tasks.segment import Segment
from benchmarks.evidence.segmentation import Protocol, segmenting

RECIPES = Path(__file__).parents[3] / "recipes"
OFFICIAL = {
    # size, preset, head, pixels, base, lr, layer decay, drop path
    "segment_ade20k_base": ("base", "plus", "upernet", 512, (2048, 512), 7e-4, 0.65, 0.1),
    "segment_ade20k_intermediate": ("base", "plus", "upernet", 512, (2048, 512), 3e-5, 0.9, 0.1),
    "segment_ade20k_large": ("large", "plus", "upernet", 512, (2048, 512), 2e-5, 0.95, 0.2),
    "segment_ade20k_640": ("base", "plus", "upernet", 640, (2560, 640), 3e-5, 0.9, 0.1),
    "segment_ade20k_setr": ("base", "plain", "setr_pup", 512, (2048, 512), 1e-3, 0.65, 0.1),
}
TINY = (
    "--model.width 16 --model.depth 2 --model.num-heads 2 --model.channels 8 --model.image-size 32 --crops.base 128 32 "
    "--data.builtin-size 48 --device cpu --log.progress none"
)


def load(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def run(module, cache, folder, *arguments):
    words = [*TINY.split(), "--data.cache-dir", cache, "--output-dir", str(folder), *arguments]
    with pytest.raises(SystemExit) as done:
        main(module.config, Segment, arguments=words)
    return done.value.code


@pytest.mark.parametrize("name", OFFICIAL)
def test_values_are_the_official_ones(name):
    c = load(name).config
    found = (
        c.model.size, c.model.preset, c.model.head, c.model.image_size, c.crops.base, c.optim.lr, c.layer_decay,
        c.model.drop_path_rate,
    )  # fmt: skip
    assert found == OFFICIAL[name]
    assert (c.steps, c.batch_size, c.optim.warmup_steps, c.optim.schedule) == (160_000, 16, 1500, "poly")
    assert (c.optim.min_lr, c.optim.weight_decay, c.optim.betas, c.optim.clip_grad) == (0.0, 0.05, (0.9, 0.999), None)
    assert c.optim.warmup_lr == pytest.approx(1e-6 * c.optim.lr)
    assert (c.auxiliary_weight, c.model.dropout, c.eval_every) == (0.4, 0.1, 16_000)
    assert (c.data.num_classes, c.data.reduce_zero_label, c.data.normalization) == (150, True, "imagenet")
    assert (c.crops.ratio, c.crops.cat_max_ratio, c.crops.flip_probability) == ((0.5, 2.0), 0.75, 0.5)
    assert c.crops.photometric
    assert c.inference().stride == {512: 341, 640: 426}[c.model.image_size]


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_demo_runs_to_its_end(name, cache, tmp_path, capsys):
    assert run(load(name), cache, tmp_path / "run") == 0
    output = capsys.readouterr().out
    assert "Built-in demo: the real model on crops of 32 pixels" in output
    assert "torchrun --nproc-per-node 8" in output
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert (tmp_path / "run" / "segmentations.png").exists()


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_demo_keeps_model_and_rates(name):
    config = load(name).config
    demo = demo_of(config)
    assert demo.output_dir != config.output_dir
    assert dataclasses.replace(demo.model, image_size=config.model.image_size) == config.model
    assert dataclasses.replace(demo.optim, warmup_steps=1500) == config.optim
    assert demo.layer_decay == config.layer_decay
    assert dataclasses.replace(demo.crops, base=config.crops.base) == config.crops


def test_a_recipe_can_be_planned(cache, tmp_path, capsys):
    assert run(load("segment_ade20k_base"), cache, tmp_path / "run", "--dry-run") == 0
    output = capsys.readouterr().out
    assert "backbone FLOPs per image" in output
    assert "nothing is trained" in output
    assert not (tmp_path / "run").exists()


def test_errors_are_one_line_on_the_command_line(cache, tmp_path, capsys):
    module = load("segment_ade20k_base")
    assert run(module, cache, tmp_path / "run", "--batch-per-device", "1") == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: UPerNet's batch norms need two images at once")


def test_the_arms_of_the_evidence_differ_only_in_what_they_compare():
    protocol = Protocol(pretrained="x")
    ours, scratch = (segmenting(protocol, weights, 1e-3, 0) for weights in ("x", None))
    same = dataclasses.replace(
        scratch, weights="x", scratch=False, output_dir=ours.output_dir, layer_decay=protocol.layer_decay
    )
    assert same == ours
    assert scratch.layer_decay == 1.0
    held = [segmenting(protocol, None, 1e-3, s).data.builtin_seed for s in (0, 1, 2, 100)]
    assert len(set(held)) == 4
