"""Does going on pre-training help? A tiny checkpoint of drawn scenes, continued on scans of another kind of scene.

    python -m benchmarks.evidence.continued --output records/continued.json       # 25 minutes of one CPU core

The checkpoint learns from cluttered coloured scenes and crops of photographs. The own images are scans of surfaces: one
texture all over, grey, 12 bits in 16-bit TIFFs, with noise. Compared by k-NN and a linear probe on labelled scans (12
classes: 4 textures in 3 sizes): the checkpoint as it is, continued on the scans, and from scratch on them with as many
steps, over three seeds; and, with seed 0 alone, other values of what the recipe's defaults set. A functional check.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from beit_fast.data import scenes
from beit_fast.train import engine
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.metrics import read_metrics
from beit_fast.train.tasks import pretrain
from benchmarks.evidence.record import t_quantile
from benchmarks.machine import environment

SIDE, RANGE = 64, (0.0, 4095.0)
METRICS = ("knn_top1_percent", "probe_top1_percent")
PERIODS = (5.0, 8.0, 12.0)
"""Sizes of the textures, in pixels."""


@dataclasses.dataclass(frozen=True)
class Study:
    """Sizes; the defaults are those of the record."""

    first_steps: int = 800
    """Of the checkpoint."""
    steps: int = 200
    """Of each run on the scans."""
    batch: int = 32
    seeds: int = 3
    scans: int = 2000
    train: int = 960
    test: int = 720


def scan(index: int, seed: int) -> tuple[np.ndarray, int]:
    """A scan uint16 (64, 64) of 12 bits, and its class."""
    rng = np.random.default_rng([seed, index])
    label = index % (len(scenes.TEXTURES) * len(PERIODS))
    texture, period = label % len(scenes.TEXTURES), PERIODS[label // len(scenes.TEXTURES)]
    axis = np.arange(SIDE, dtype=np.float32)
    share = scenes.TEXTURES[texture](axis, axis, period * rng.uniform(0.85, 1.15), rng.random(48, dtype=np.float32))
    levels = rng.uniform(0.2, 0.5) + rng.uniform(0.15, 0.5) * share + rng.normal(0, 0.15, (SIDE, SIDE))
    return np.clip(RANGE[1] * levels, *RANGE).astype(np.uint16), label


def write_scans(root: Path, study: Study) -> None:
    """The scans without labels, and those with them; no two sets share a scene."""
    sets = [("scans", study.scans, 11), ("labelled/train", study.train, 12), ("labelled/val", study.test, 13)]
    for name, count, seed in sets:
        for index in range(count):
            pixels, label = scan(index, seed)
            folder = root / name if name == "scans" else root / name / f"{label:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{index:05d}.tif")


def configuration(
    root: Path, name: str, study: Study, steps: int, seed: int, **changes: object
) -> pretrain.PretrainConfig:
    """The tiny model of recipes/pretrain_tiny_builtin.py, with a relative position bias as released weights have."""
    model = pretrain.ModelConfig(
        size="tiny", width=128, depth=4, num_heads=4, image_size=SIDE, patch_size=8, drop_path_rate=0.0, init_std=0.05
    )
    values = {
        "output_dir": root / name, "steps": steps, "seed": seed, "batch_size": study.batch,
        "batch_per_device": study.batch, "precision": "fp32", "device": "cpu", "model": model,
        "masking": pretrain.MaskingConfig(num_masked=None), "tokenizer": pretrain.TokenizerConfig(name="demo"),
        "optim": OptimConfig(lr=1.5e-3, warmup_steps=max(1, steps // 10), betas=(0.9, 0.98)),
        "data": pretrain.DataConfig(
            builtin_images=4000, builtin_size=SIDE, normalization="half", scale=(0.6, 1.0), jitter=0.1, threads=1
        ),
        "checkpoint": CheckpointConfig(every_steps=10_000), "log": LogConfig(every_steps=100, progress="lines"),
    }  # fmt: skip
    return pretrain.PretrainConfig(**(values | changes))


def on_scans(root: Path, name: str, study: Study, seed: int, **changes: object) -> dict[str, float]:
    """Train on the scans; the accuracies before and after."""
    data = pretrain.DataConfig(
        path=str(root / "scans"), channels=1, value_range=RANGE, normalization="half", scale=(0.6, 1.0), jitter=0.1,
        threads=1,
    )  # fmt: skip
    knn = pretrain.EvaluationConfig(knn=str(root / "labelled"))
    run = configuration(root, name, study, study.steps, seed, data=data, evaluation=knn, **changes)
    began = time.perf_counter()
    engine.run(pretrain.MaskedImageModeling(run))
    lines = [line for line in read_metrics(root / name / "metrics.jsonl") if line["kind"] == "evaluation"]
    first, last = ({m: line[m] for m in METRICS} for line in (lines[0], lines[-1]))
    return {f"start_{m}": v for m, v in first.items()} | last | {"seconds": time.perf_counter() - began}


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval."""
    mean = statistics.fmean(values)
    half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def differences(runs: dict[str, dict[str, float]], seeds: int) -> dict[str, tuple[float, float, float]]:
    """Continued minus the checkpoint as it is, and minus scratch, paired by seed; empty below two seeds."""
    done = [s for s in range(seeds) if f"continued_{s}" in runs and f"scratch_{s}" in runs]
    found: dict[str, tuple[float, float, float]] = {}
    for metric in METRICS if len(done) > 1 else ():
        after = [runs[f"continued_{s}"][metric] for s in done]
        before = [runs[f"continued_{s}"][f"start_{metric}"] for s in done]
        scratch = [runs[f"scratch_{s}"][metric] for s in done]
        for name, others in (("as it is", before), ("scratch", scratch)):
            found[f"{metric}: continued minus {name}"] = interval([x - y for x, y in zip(after, others, strict=True)])
    return found


def main() -> None:
    """Run what is not in the record yet, and write it after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/continued"))
    options = parser.parse_args()
    study, root = Study(), options.work
    record = json.loads(options.output.read_text()) if options.output.exists() else {
        "study": dataclasses.asdict(study), "environment": environment(torch.device("cpu")), "runs": {},
    }  # fmt: skip
    if not (root / "labelled/val").is_dir():
        write_scans(root, study)
    checkpoint = root / "checkpoint"
    if not (checkpoint / "complete.json").is_file():
        began = time.perf_counter()
        engine.run(pretrain.MaskedImageModeling(configuration(root, "checkpoint", study, study.first_steps, 0)))
        record["checkpoint_seconds"] = time.perf_counter() - began
    weights = str(checkpoint)
    plain = {"weights": weights, "optim": OptimConfig(lr=5e-4, warmup_steps=20, betas=(0.9, 0.98)), "layer_decay": 0.75}
    arms: dict[str, tuple[int, dict[str, object]]] = {}
    for seed in range(study.seeds):
        arms[f"continued_{seed}"] = (seed, plain)
        arms[f"scratch_{seed}"] = (seed, {})
    for lr in (1.5e-4, 1.5e-3):
        arms[f"lr_{lr:g}"] = (0, plain | {"optim": OptimConfig(lr=lr, warmup_steps=20, betas=(0.9, 0.98))})
    arms["no_layer_decay"] = (0, plain | {"layer_decay": None})
    arms["half_frozen"] = (0, plain | {"frozen_blocks": 2})
    for name, (seed, changes) in arms.items():
        if name in record["runs"]:
            continue
        record["runs"][name] = on_scans(root, name, study, seed, **changes)
        record["differences"] = differences(record["runs"], study.seeds)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1) + "\n")
        print(name, record["runs"][name], flush=True)
    print(json.dumps(record.get("differences"), indent=1))


if __name__ == "__main__":
    main()
