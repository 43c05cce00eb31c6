"""The built-in demo of a segmentation recipe, and what it says of itself."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

from beit_fast.train.config import RunConfig
from beit_fast.train.tasks.segment import SegmentConfig

SIDE = 128
"""Pixels of the demo's crops: at 512 the head alone would take a CPU minutes per step."""


def demonstrate_segmentation(paper: SegmentConfig, **values: Any) -> SegmentConfig:
    """The same recipe in a few steps on small crops of built-in scenes; `values` are further fields.

    It keeps model, heads and learning rates, and starts from random weights unless --weights is given.
    """
    folder = paper.output_dir.with_name(paper.output_dir.name + "_demo")
    data = dataclasses.replace(
        paper.data, num_classes=None, reduce_zero_label=False, builtin_images=32, builtin_validation_images=2,
        builtin_size=SIDE, threads=1, prefetch=1,
    )  # fmt: skip
    short: dict[str, Any] = {
        "output_dir": folder, "steps": 3, "batch_size": 2, "batch_per_device": 2, "data": data,
        "model": dataclasses.replace(paper.model, image_size=SIDE),
        "crops": dataclasses.replace(paper.crops, base=(4 * SIDE, SIDE)),
        "optim": dataclasses.replace(paper.optim, warmup_steps=1),
        "log": dataclasses.replace(paper.log, every_steps=1),
    }  # fmt: skip
    return dataclasses.replace(paper, **(short | values))


def segmentation_banner(paper: RunConfig, demo: RunConfig) -> str:
    """What the demo is and is not, and the command of the real run."""
    assert isinstance(paper, SegmentConfig)
    assert isinstance(demo, SegmentConfig)
    program = Path(sys.argv[0])
    with contextlib.suppress(ValueError):
        program = program.resolve().relative_to(Path.cwd())
    start = "random weights, as no --weights are given" if demo.weights is None else demo.weights
    line = "-" * 100
    return f"""{line}
Built-in demo: the real model on crops of {demo.model.image_size} pixels, {demo.steps} steps of {demo.batch_size}
scenes that are drawn on this machine with their label maps, from {start}.
It shows that everything works; its numbers do not compare with ADE20K's.
The real run, {paper.steps:,} steps of {paper.batch_size} crops of {paper.model.image_size} pixels:

    torchrun --nproc-per-node 8 {program} --data.path /path/to/ADEChallengeData2016 --weights WEIGHTS

What that takes: the same with --dry-run.
{line}"""
