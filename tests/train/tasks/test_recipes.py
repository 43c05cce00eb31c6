"""The recipes' values against the paper's tables, and their first words to a bare machine."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from beit_fast.cli.demo import banner, demo_of

RECIPES = Path(__file__).parents[3] / "recipes"
ALL = sorted(path.stem for path in RECIPES.glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_is_values(name):
    text = (RECIPES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    assert "def " not in text
    assert f"python recipes/{name}.py" in load(name).__doc__


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "pretrain_beit_base",
            ("the real BEiT (base), 30 steps of 4 images", "800 epochs at batch 2048, DALL-E's", "--max-steps 300"),
        ),
        ("pretrain_beit_large", ("the real BEiT (large), 10 steps", "imagenet/train", "--max-steps 100")),
        ("pretrain_beitv2_base", ("1600 epochs at batch 2048, BEiT v2's tokenizer fetched",)),
        (
            "train_tokenizer_vqkd",
            ("the real tokenizer, 4 steps", "untrained tiny BEiT", "taught by clip:openai/clip-vit"),
        ),
        ("finetune_imagenet_base", ("labelled images", "100 epochs at batch 1024", "imagenet --weights runs/pretrain")),
        ("segment_ade20k_base", ("on crops of 128 pixels", "160,000 steps of 16 crops of 512 pixels", "ADE20K")),
    ],
)
def test_a_demo_says_what_it_is_and_what_the_real_run_is(name, facts):
    config = load(name).config
    text = banner(config, demo_of(config), "beit-fast train X")
    assert "    beit-fast train X --data.path /path/to/" in text
    for fact in facts:
        assert fact in text, (fact, text)


@pytest.mark.parametrize(
    ("name", "size", "epochs", "warmup", "clip", "normalization"),
    [
        ("pretrain_beit_base", "base", 800, (10.0, None), 3.0, "imagenet"),
        ("pretrain_beit_large", "large", 800, (10.0, None), 1.0, "imagenet"),
        ("pretrain_beit_base_22k", "base", 150, (10.0, 10_000), 3.0, "half"),
        ("pretrain_beit_large_22k", "large", 150, (10.0, 10_000), 1.0, "half"),
    ],
)
def test_values_of_the_paper(name, size, epochs, warmup, clip, normalization):
    module = load(name)
    config = module.config
    assert (config.model.size, config.model.preset, config.model.drop_path_rate) == (size, "plus", 0.1)
    assert (config.epochs, config.steps, config.max_steps, config.batch_size) == (epochs, None, None, 2048)
    optim = config.optim
    assert (optim.lr, optim.min_lr, optim.weight_decay, optim.betas, optim.eps) == (
        1.5e-3,
        1e-5,
        0.05,
        (0.9, 0.999),
        1e-8,
    )
    assert (optim.warmup_epochs, optim.warmup_steps) == warmup
    assert optim.clip_grad == clip
    assert (config.masking.num_masked, config.masking.min_num_patches, config.masking.min_aspect) == (75, 16, 0.3)
    assert (config.data.normalization, config.data.scale, config.data.jitter) == (normalization, (0.08, 1.0), 0.4)
    assert config.tokenizer.name == "dalle"
    # the demo is the real model, and differs in nothing that it does not set
    demo = demo_of(config)
    assert (demo.model, demo.masking, demo.data) == (config.model, config.masking, config.data)
    assert demo.output_dir != config.output_dir
    assert demo.tokenizer.name == "demo"
    assert demo.max_steps < demo.steps


@pytest.mark.parametrize("name", ["pretrain_beit_large", "pretrain_beit_base_22k"])
def test_before_anything_is_installed(name):
    """-S leaves the installed packages out: a bare machine."""
    command = [sys.executable, "-S", str(RECIPES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "`make pretrain`, or: pip install" in done.stderr
