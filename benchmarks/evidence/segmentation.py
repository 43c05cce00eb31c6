"""Does pre-training help to segment? The same tiny model from our pre-training and from scratch, at one budget.

    python -m benchmarks.evidence.segmentation --pretrained RUN_FOLDER --record RECORD.json

Everything is drawn scenes of 64 x 64 pixels with their label maps, 11 classes: the ground, plain leaves of six shapes,
and four textures. The BEiT has width 128 and depth 4, under UPerNet with 16 channels: a functional check of the method,
not ADE20K. `benchmarks.evidence.ablation` makes the pre-training, on scenes of a set of its own without labels.
Labelled training scenes differ from seed to seed; the validation scenes are always the same and never trained on.

Both arms differ in their initial weights and, as fine-tuning and training from scratch do, in the layer-wise decay of
the learning rate. Each chooses from the same learning rates by one shorter run per rate on a set of labelled scenes
that is not used again. Run folders are kept, so the program continues where it was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from beit_fast.data.builtin import NOTICE
from beit_fast.train import engine
from beit_fast.train.config import CheckpointConfig, LogConfig, OptimConfig
from beit_fast.train.tasks.segment import (
    CropConfig,
    Segment,
    SegmentationDataConfig,
    SegmentationEvaluationConfig,
    SegmentationModelConfig,
    SegmentConfig,
)
from benchmarks import machine
from benchmarks.evidence.protocol import SHAPE, TUNING_SEED

METRICS = ("mean_iou_percent", "mean_accuracy_percent", "pixel_accuracy_percent")


@dataclass(frozen=True)
class Protocol:
    """Segmentation from pre-trained weights against segmentation from scratch, on drawn scenes."""

    pretrained: str
    """Run folder of the pre-training, or a file of weights of the same architecture."""
    output: Path = Path("runs/evidence_segmentation")
    """Run folders of all runs."""
    record: Path | None = None
    """JSON to write, and pictures of the curves and of segmented scenes beside it."""
    seeds: int = 3
    """Labelled training sets, orders and initial heads."""
    labelled_images: int = 1000
    """Labelled training scenes per seed."""
    validation_images: int = 200
    """Validation scenes."""
    steps: int = 900
    """Steps of either arm."""
    tuning_steps: int = 400
    """Steps of a run that chooses the learning rate."""
    batch_size: int = 8
    """Crops per step."""
    rates: tuple[float, ...] = (2e-3, 4e-3)
    """Learning rates that both choose from."""
    layer_decay: float = 0.6
    """From pre-trained weights: the new head needs a rate that would undo them. From scratch all layers learn alike."""
    cache_dir: str | None = None
    """Where scenes are kept."""
    device: str = "auto"
    """Where to run."""
    threads: int = 1
    """Threads that make crops."""


def segmenting(protocol: Protocol, weights: str | None, rate: float, seed: int) -> SegmentConfig:
    """One run, from `weights` or from scratch."""
    scratch, steps = weights is None, protocol.tuning_steps if seed == TUNING_SEED else protocol.steps
    name = f"{'scratch' if scratch else 'pretrained'}_lr{rate:g}_seed{seed}"
    return SegmentConfig(
        output_dir=protocol.output / name, device=protocol.device, precision="fp32", weights=weights, scratch=scratch,
        seed=seed, steps=steps, batch_size=protocol.batch_size, batch_per_device=protocol.batch_size,
        eval_every=max(steps // 3, 1), layer_decay=1.0 if scratch else protocol.layer_decay,
        data=SegmentationDataConfig(
            builtin_images=protocol.labelled_images, builtin_validation_images=protocol.validation_images,
            builtin_size=64, builtin_seed=1000 + seed, cache_dir=protocol.cache_dir, normalization="half",
            threads=protocol.threads
        ),
        model=SegmentationModelConfig(**SHAPE, channels=16, auxiliary_channels=16),
        crops=CropConfig(base=(64, 64), ratio=(1.0, 1.0), cat_max_ratio=1.0, photometric=False),
        evaluation=SegmentationEvaluationConfig(windows_per_batch=1, pictures=6),
        optim=OptimConfig(lr=rate, min_lr=0.0, warmup_steps=steps // 10, schedule="poly", clip_grad=3.0),
        checkpoint=CheckpointConfig(every_steps=1000), log=LogConfig(every_steps=40, progress="lines")
    )  # fmt: skip


def run(config: SegmentConfig) -> dict[str, float]:
    """Train to the end (or find it trained) and give its scores."""
    result = engine.run(Segment(config))
    if result.exit_code:
        raise SystemExit(result.exit_code)
    return {name: result.metrics[name] for name in METRICS}


def curve(config: SegmentConfig) -> list[tuple[int, float]]:
    """(step, mIoU in percent) of a run's evaluations."""
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["mean_iou_percent"]) for line in lines if line["kind"] == "evaluation"]


def gather(protocol: Protocol) -> dict[str, Any]:
    """Run both arms."""
    found: dict[str, Any] = {}
    for name, weights in (("pretrained", protocol.pretrained), ("scratch", None)):
        tuned = {
            rate: run(segmenting(protocol, weights, rate, TUNING_SEED))["mean_iou_percent"] for rate in protocol.rates
        }
        best = max(tuned, key=tuned.__getitem__)
        configs = [segmenting(protocol, weights, best, seed) for seed in range(protocol.seeds)]
        scores = [run(config) for config in configs]
        values = [score["mean_iou_percent"] for score in scores]
        found[name] = {
            "tuning_mean_iou_percent_by_rate": tuned, "chosen_rate": best, "scores": scores,
            "mean_iou_percent": values, "mean": statistics.mean(values),
            "standard_deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
            "curves": [curve(config) for config in configs]
        }  # fmt: skip
    found["pretrained_minus_scratch_points"] = found["pretrained"]["mean"] - found["scratch"]["mean"]
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """Validation mIoU over steps of every seed, both arms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, colour in (("pretrained", "tab:blue"), ("scratch", "tab:orange")):
        arm = found[name]
        for number, points in enumerate(arm["curves"]):
            steps, values = zip(*points, strict=True)
            label = f"{name}: {arm['mean']:.1f} ± {arm['standard_deviation']:.1f}" if number == 0 else None
            axes.plot(steps, values, color=colour, marker=".", label=label)
    axes.set(xlabel="step", ylabel="validation mIoU (%)", title="drawn scenes, 11 classes", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    protocol = tyro.cli(Protocol)
    found = gather(protocol)
    print(json.dumps(found, indent=1))
    if protocol.record is not None:
        device = engine.start_world(protocol.device).device
        left_out = ("output", "record", "cache_dir", "pretrained")
        settings = {k: v for k, v in dataclasses.asdict(protocol).items() if k not in left_out}
        record = {"subject": "segmentation", "data": NOTICE, "settings": settings, "results": found,
                  "machine": machine.environment(device)}  # fmt: skip
        protocol.record.write_text(json.dumps(record, indent=1, default=str) + "\n")
        draw(found, protocol.record.with_suffix(".png"))
        for name, weights in (("pretrained", protocol.pretrained), ("scratch", None)):
            folder = segmenting(protocol, weights, found[name]["chosen_rate"], 0).output_dir
            target = protocol.record.with_name(f"{protocol.record.stem}_{name}.png")
            shutil.copyfile(folder / "segmentations.png", target)
        print(f"wrote {protocol.record}")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
