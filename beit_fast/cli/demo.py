"""The built-in demo of a recipe: the same model for a few steps on images drawn here, where no --data.path is given.

Model and learning rates are the recipe's; length, batch and data are small enough for a CPU.
"""

from dataclasses import replace
from functools import singledispatch
from typing import Any

from beit_fast.train.config import CheckpointConfig, LogConfig, RunConfig
from beit_fast.train.tasks.finetune import FinetuneConfig
from beit_fast.train.tasks.pretrain import PretrainConfig, TokenizerConfig
from beit_fast.train.tasks.probe import ProbeConfig
from beit_fast.train.tasks.segment import SegmentConfig
from beit_fast.train.tasks.teacher import TeacherConfig
from beit_fast.train.tasks.vqkd import TrainVqkdConfig

SEGMENTATION_CROP = 128
"""Pixels of a segmentation demo's crops: at 512 the head alone would take a CPU minutes per step."""

LINE = "-" * 100


@singledispatch
def demo_of(config: RunConfig) -> RunConfig | None:
    """Return the values of a recipe's demo; None for a task that has none."""
    return None


def _shortened(config: Any, **values: Any) -> Any:
    folder = config.output_dir.with_name(config.output_dir.name + "_demo")
    return replace(config, output_dir=folder, **({"log": LogConfig(every_steps=1)} | values))


@demo_of.register
def _(config: PretrainConfig) -> RunConfig:
    """About three minutes on two CPU cores."""
    steps = 10 if config.model.size == "large" else 30
    data = replace(config.data, one_view=False)  # the small tokenizer has tokens of 8 pixels
    return _shortened(
        config, steps=1000, max_steps=steps, batch_size=4, batch_per_device=4, tokenizer=TokenizerConfig(name="demo"),
        data=data, optim=replace(config.optim, warmup_steps=5),
        checkpoint=CheckpointConfig(every_steps=min(steps // 2, 10)),
    )  # fmt: skip


@demo_of.register
def _(config: TrainVqkdConfig) -> RunConfig:
    return _shortened(
        config, steps=4, batch_size=4, batch_per_device=4, teacher=TeacherConfig(name="random"),
        data=replace(config.data, builtin_images=64), optim=replace(config.optim, warmup_steps=1),
        evaluation=replace(config.evaluation, images=8),
    )  # fmt: skip


@demo_of.register
def _(config: FinetuneConfig) -> RunConfig:
    data = replace(
        config.data, num_classes=None, builtin_images=64, builtin_validation_images=16, threads=1, prefetch=1
    )
    optim = replace(config.optim, warmup_steps=1)
    return _shortened(config, steps=4, batch_size=4, batch_per_device=2, data=data, optim=optim)


@demo_of.register
def _(config: ProbeConfig) -> RunConfig:
    data = replace(config.data, num_classes=None, builtin_images=64, builtin_validation_images=32, threads=1)
    return _shortened(
        config, epochs=20, batch_size=16, batch_per_device=16, augment=False, standardise=True, feature_batch=8,
        data=data, log=LogConfig(every_steps=20),
    )  # fmt: skip


@demo_of.register
def _(config: SegmentConfig) -> RunConfig:
    side = SEGMENTATION_CROP
    data = replace(
        config.data, num_classes=None, reduce_zero_label=False, builtin_images=32, builtin_validation_images=2,
        builtin_size=side, threads=1, prefetch=1,
    )  # fmt: skip
    return _shortened(
        config, steps=3, batch_size=2, batch_per_device=2, data=data, optim=replace(config.optim, warmup_steps=1),
        model=replace(config.model, image_size=side), crops=replace(config.crops, base=(4 * side, side)),
    )  # fmt: skip


def banner(recipe: RunConfig, demo: RunConfig, command: str) -> str:
    """What the demo is and is not, and the real run, started by `command`."""
    steps = demo.max_steps or demo.steps
    length = f"{demo.epochs:g} epochs" if steps is None else f"{steps} steps"
    weights = getattr(demo, "weights", None) or "random weights, as no --weights are given"
    model, data = "the real model", "imagenet --weights runs/pretrain_beit_base"
    images, start, peer = "labelled images that are drawn on this machine", f", from {weights}", "ImageNet"
    real = f"{recipe.epochs:g} epochs at batch {recipe.batch_size}"
    hint = ""
    if isinstance(demo, PretrainConfig):
        model, data = f"the real BEiT ({demo.model.size})", "imagenet/train"
        images, start = "images that are drawn on this machine", ", with the small tokenizer that comes along"
        assert isinstance(recipe, PretrainConfig)
        owner = "BEiT v2" if recipe.tokenizer.name == "vqkd" else "DALL-E"
        real += f", {owner}'s tokenizer fetched at first use"
        hint = f" To go on with this demo: --max-steps {10 * (steps or 1)}"
    elif isinstance(recipe, SegmentConfig) and isinstance(demo, SegmentConfig):
        model, data = f"{model} on crops of {demo.model.image_size} pixels", "ADEChallengeData2016 --weights WEIGHTS"
        images, peer = "scenes that are drawn on this machine with their label maps", "ADE20K"
        real = f"{recipe.steps:,} steps of {recipe.batch_size} crops of {recipe.model.image_size} pixels"
    elif isinstance(recipe, TrainVqkdConfig):
        model, data = "the real tokenizer", "imagenet/train"
        images, start = "images that are drawn on this machine", ", with an untrained tiny BEiT as the teacher"
        real += f", taught by {recipe.teacher.name}"
    elif getattr(recipe, "scratch", False):
        data = "imagenet"
    return f"""{LINE}
Built-in demo: {model}, {length} of {demo.batch_size} {images}{start}.
It shows that everything works; its numbers do not compare with those of {peer}. The real run, {real}:

    {command} --data.path /path/to/{data}

What that takes: the same with --dry-run.{hint}
{LINE}"""
