"""The recipes for labelled images: the paper's values, and each one run to its end with a tiny model."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from beit_fast.cli.demo import demo_of
from beit_fast.cli.train import main
from beit_fast.train.tasks.finetune import Finetune
from beit_fast.train.tasks.probe import LinearProbe
from tests.images import write_class_folders

RECIPES = Path(__file__).parents[3] / "recipes"
FINETUNE = (
    "finetune_cifar100", "finetune_imagenet_384", "finetune_imagenet_after_22k", "finetune_imagenet_base",
    "finetune_imagenet_large", "intermediate_imagenet22k_base", "intermediate_imagenet22k_large",
    "scratch_imagenet_base",
)  # fmt: skip
QUICK = ("finetune_imagenet_base", "intermediate_imagenet22k_base")
TINY = "--model.width 16 --model.depth 2 --model.num-heads 2 --data.builtin-size 32 --device cpu --log.progress none"


def load(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def run(module, task, cache, folder, *arguments):
    words = [*TINY.split(), "--data.cache-dir", cache, "--output-dir", str(folder), *arguments]
    with pytest.raises(SystemExit) as done:
        main(module.config, task, arguments=words)
    return done.value.code


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FINETUNE]
)
def test_a_demo_runs_to_its_end(name, cache, tmp_path, capsys):
    """The real image size and augmentation, the demo's own length, a narrow model of two blocks."""
    size = [] if name == "finetune_imagenet_384" else ["--model.image-size", "64"]
    assert run(load(name), Finetune, cache, tmp_path / "run", *size) == 0
    output = capsys.readouterr().out
    assert "Built-in demo" in output
    assert f"recipes/{name}.py" in load(name).__doc__
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_the_probes_demo_runs_to_its_end(cache, tmp_path):
    assert run(load("linear_probe"), LinearProbe, cache, tmp_path / "run", "--model.image-size", "64") == 0
    assert (tmp_path / "run" / "layers.tsv").read_text().count("\n") == 3


def test_the_full_recipe_can_be_planned(cache, tmp_path, capsys):
    write_class_folders(tmp_path / "data", ("ant", "bee"), 8, 2)
    arguments = "--data.num-classes 2 --batch-size 8 --batch-per-device 4 --model.image-size 32 --dry-run --scratch"
    code = run(load("finetune_imagenet_base"), Finetune, cache, tmp_path / "run",
               "--data.path", str(tmp_path / "data"), *arguments.split())  # fmt: skip
    assert code == 0
    output = capsys.readouterr().out
    assert "Built-in demo" not in output
    assert "200 of a schedule of 200" in output


def test_errors_are_one_line_on_the_command_line(cache, tmp_path, capsys):
    module = load("finetune_imagenet_base")
    assert run(module, Finetune, cache, tmp_path / "run", "--batch-size", "3", "--batch-per-device", "3") == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: mixup and CutMix pair the images of a micro-batch, but --batch-size 3")


PAPER = {
    # epochs, batch, lr, warm-up, layer decay, weight decay, clip, smoothing, mixup, cutmix, repeats, erasing, norm
    "finetune_imagenet_base":         (100, 1024, 4e-3, 20, 0.65, 0.05, None, 0.1, 0.8, 1.0, 3, 0.25, "imagenet"),
    "finetune_imagenet_large":        (50, 1024, 2e-3, 5, 0.75, 0.05, None, 0.1, 0.8, 1.0, 1, 0.25, "imagenet"),
    "finetune_cifar100":              (150, 512, 4e-3, 20, 0.65, 0.3, None, 0.1, 0.8, 1.0, 3, 0.0, "imagenet"),
    "intermediate_imagenet22k_base":  (90, 4096, 3e-3, 5, 0.65, 0.05, None, 0.1, 0.0, 0.0, 1, 0.25, "half"),
    "intermediate_imagenet22k_large": (90, 2048, 2e-3, 5, 0.75, 0.05, None, 0.1, 0.0, 0.0, 1, 0.25, "half"),
    "finetune_imagenet_after_22k":    (30, 512, 2e-5, 5, 0.85, 1e-8, None, 0.1, 0.0, 0.0, 1, 0.25, "half"),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_values_of_the_paper(name):
    c = load(name).config
    assert (
        c.epochs, c.batch_size, c.optim.lr, c.optim.warmup_epochs, c.layer_decay, c.optim.weight_decay,
        c.optim.clip_grad, c.augment.smoothing, c.augment.mixup, c.augment.cutmix, c.augment.repeats,
        c.augment.erasing, c.data.normalization,
    ) == PAPER[name]  # fmt: skip
    assert (c.augment.rand_augment, c.optim.min_lr, c.optim.betas) == (9.0, 1e-6, (0.9, 0.999))
    assert not c.scratch
    assert c.steps is None


@pytest.mark.parametrize("name", [*FINETUNE, "linear_probe"])
def test_a_demo_differs_in_its_length_and_its_data_only(name):
    config = load(name).config
    demo = demo_of(config)
    assert demo.output_dir != config.output_dir
    assert demo.model == config.model
    if name != "linear_probe":
        changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(demo, f.name)}
        assert changed == {"output_dir", "steps", "batch_size", "batch_per_device", "data", "optim", "log"}
        assert dataclasses.replace(demo.optim, warmup_steps=None) == config.optim


def test_the_table_of_recipes_is_up_to_date():
    from benchmarks.recipe_table import table

    written = (RECIPES / "README.md").read_text()
    assert written == table(), "write it again: python -m benchmarks.recipe_table"
    assert all(f"({path.name})" in written for path in RECIPES.glob("*.py"))
