"""Does pre-training help? Fine-tuning against training from scratch, and probes against random weights, in one record.

    python -m benchmarks.evidence.finetune --record benchmarks/records/<date>_<device>_finetune.json

Everything is drawn scenes of 64 x 64 pixels, 24 classes, and a BEiT of width 128 and depth 4: a functional check of the
method, not ImageNet. Pre-training sees unlabelled grey scenes of its own; the labelled training scenes differ from seed
to seed, the validation scenes are always the same and are never trained on. With `--labels hues` the classes are 6
shapes x 4 hues: a model without pre-training learns the hues at once, and shapes slowly. With `--labels scenes` they
are 6 shapes x 4 textures, of which it learned nothing at any batch size, rate or number of steps tried.

Both ways of training have the same augmentation and choose their learning rate in the same way: of three, and of half
the least or twice the largest as long as that is better still, by one run each on a set of labelled scenes that is not
used again. The probes of either model choose likewise. Training from scratch has
`scratch_steps` steps, at least three times as many. The run folders are kept, so the program continues where it was
stopped. `--arms probe` runs a part of it.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from beit_fast.data.builtin import NOTICE
from beit_fast.train import engine
from beit_fast.train.tasks.finetune import ClassifierModelConfig, Finetune, FinetuneConfig, LabelledDataConfig
from beit_fast.train.tasks.pretrain import MaskedImageModeling, ModelConfig, PretrainConfig
from beit_fast.train.tasks.probe import LinearProbe, ProbeConfig
from benchmarks import machine
from benchmarks.evidence import scene_protocol

Arm = Literal["pretrain", "probe", "tune", "finetune", "scratch"]
ARMS: tuple[Arm, ...] = ("pretrain", "probe", "tune", "finetune", "scratch")
TUNING_SEED = 100
HELD_OUT = 600
"""Scenes on which pre-training is measured."""
SHAPE: dict[str, Any] = scene_protocol.SHAPE | {"use_abs_pos_emb": True, "layer_scale_init": 0.0}


@dataclass(frozen=True)
class Protocol:
    """Fine-tuning against scratch, probes against random weights, on drawn scenes."""

    output: Path = Path("runs/evidence_finetune")
    """Run folders of all arms."""
    record: Path | None = None
    """JSON to write, and a picture of the curves beside it."""
    pretrained: str | None = None
    """Weights in place of an own pre-training (a run folder or a file) of the same architecture."""
    labels: Literal["hues", "scenes"] = "hues"
    """Labelled scenes."""
    arms: tuple[Arm, ...] = ARMS
    """Which parts to run; the record holds what has been run so far."""
    seeds: int = 3
    """Labelled training sets, orders and initial weights."""
    unlabelled_images: int = 16_000
    """Scenes for pre-training."""
    pretrain_steps: int = 4000
    """Steps of pre-training, 32 scenes each."""
    labelled_images: int = 2000
    """Labelled training scenes per seed."""
    validation_images: int = 1500
    """Validation scenes."""
    finetune_steps: int = 600
    """Steps of fine-tuning, 32 scenes each."""
    scratch_steps: int = 1800
    """Steps from scratch."""
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Learning rates that both begin to choose from."""
    layer_decay: float = 0.85
    """Of fine-tuning; from scratch all layers learn alike."""
    probe_images: int = 16_000
    """Labelled scenes per seed for the probes, which train few numbers and need many scenes to tell features apart."""
    probe_rates: tuple[float, ...] = (4e-3, 1e-2, 4e-2)
    """Learning rates that the probes of either model begin to choose from."""
    probe_epochs: int = 20
    """Epochs of the probes."""
    cache_dir: str | None = None
    """Where scenes are kept."""
    device: str = "auto"
    """Where to run."""
    threads: int = 1
    """Threads that make views."""


def common(protocol: Protocol, folder: str, every: int) -> dict[str, Any]:
    """What all runs share."""
    return scene_protocol.common(protocol.output / folder, protocol.device, every)


def pretraining(protocol: Protocol) -> PretrainConfig:
    """Masked image modelling on unlabelled scenes."""
    return scene_protocol.pretraining(
        common(protocol, "pretrain", 100), ModelConfig(**SHAPE), steps=protocol.pretrain_steps,
        images=protocol.unlabelled_images, held_out=HELD_OUT, cache_dir=protocol.cache_dir, threads=protocol.threads,
    )  # fmt: skip


def labelled(protocol: Protocol, seed: int, images: int) -> LabelledDataConfig:
    """Training scenes of a seed and the validation scenes."""
    return scene_protocol.labelled(
        seed, images=images, validation_images=protocol.validation_images, builtin=protocol.labels,
        cache_dir=protocol.cache_dir, threads=protocol.threads,
    )  # fmt: skip


def probing(protocol: Protocol, weights: str | None, rate: float, seed: int) -> ProbeConfig:
    """Probes of every block on standardised features, without augmentation."""
    name = f"{protocol.labels}_probe_{'random' if weights is None else 'pretrained'}_lr{rate:g}_seed{seed}"
    config = scene_protocol.probing(
        common(protocol, name, 200), ClassifierModelConfig(**SHAPE), labelled(protocol, seed, protocol.probe_images),
        weights=weights, epochs=protocol.probe_epochs, seed=seed,
    )  # fmt: skip
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=rate))


def classifying(protocol: Protocol, weights: str | None, rate: float, seed: int) -> FinetuneConfig:
    """Fine-tuning from `weights`, or training from scratch."""
    scratch = weights is None
    steps = protocol.scratch_steps if scratch else protocol.finetune_steps
    name = f"{protocol.labels}_{'scratch' if scratch else 'finetune'}_lr{rate:g}_seed{seed}"
    return scene_protocol.classifying(
        common(protocol, name, 50), ClassifierModelConfig(**SHAPE), labelled(protocol, seed, protocol.labelled_images),
        weights=weights, steps=steps, rate=rate, layer_decay=protocol.layer_decay, seed=seed, evaluations=12,
    )  # fmt: skip


def run(task: Callable[[Any], Any], config: Any) -> dict[str, Any]:
    """Train to the end (or find it trained) and give the last metrics."""
    result = engine.run(task(config), config)
    if result.exit_code:
        raise SystemExit(result.exit_code)
    return result.metrics


def choose(top1_at: Callable[[float], float], rates: tuple[float, ...]) -> tuple[dict[float, float], float]:
    """Top-1 at every learning rate tried, and the best rate: one with no better one tried on either side."""
    found = {rate: top1_at(rate) for rate in rates}
    while True:
        best = max(found, key=found.__getitem__)
        if min(found) < best < max(found):
            return found, best
        beyond = best / 2 if best == min(found) else best * 2
        found[beyond] = top1_at(beyond)


def curve(config: FinetuneConfig) -> list[tuple[int, float]]:
    """(step, top-1 in percent) of a run's evaluations."""
    lines = [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["top1_percent"]) for line in lines if line["kind"] == "evaluation"]


def summary(values: list[float]) -> dict[str, Any]:
    return {
        "top1_percent": values,
        "mean": statistics.mean(values),
        "standard_deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
    }


def gather(protocol: Protocol) -> dict[str, Any]:
    """Run the arms asked for."""
    found: dict[str, Any] = {}
    weights = protocol.pretrained or str(protocol.output / "pretrain")
    seeds = range(protocol.seeds)
    if "pretrain" in protocol.arms and protocol.pretrained is None:
        metrics = run(MaskedImageModeling, pretraining(protocol))
        found["pretraining"] = {
            name: metrics[name] for name in ("step", "held_out_loss", "token_entropy_nats", "other_context_loss")
        }
    if "probe" in protocol.arms:
        for name, start in (("probe_pretrained", weights), ("probe_random", None)):
            tuned, best = choose(
                lambda rate, start=start: run(LinearProbe, probing(protocol, start, rate, TUNING_SEED))[
                    "best_top1_percent"
                ],
                protocol.probe_rates,
            )
            results = [run(LinearProbe, probing(protocol, start, best, seed)) for seed in seeds]
            layers = [[value for key, value in sorted(r.items()) if key.startswith("layer")] for r in results]
            found[f"{name}_tuning"] = {"top1_percent_by_rate": tuned, "chosen": best}
            found[name] = summary([r["best_top1_percent"] for r in results]) | {"layers": layers}
    for name, start in (("finetune", weights), ("scratch", None)):
        if "tune" not in protocol.arms and name not in protocol.arms:
            continue
        tuned, best = choose(
            lambda rate, start=start: run(Finetune, classifying(protocol, start, rate, TUNING_SEED))["top1_percent"],
            protocol.rates,
        )
        found[f"{name}_tuning"] = {"top1_percent_by_rate": tuned, "chosen": best}
        if name in protocol.arms:
            configs = [classifying(protocol, start, best, seed) for seed in seeds]
            values = [run(Finetune, config)["top1_percent"] for config in configs]
            found[name] = summary(values) | {"steps": configs[0].steps, "curves": [curve(c) for c in configs]}
    return found


def differences(found: dict[str, Any]) -> dict[str, float]:
    """Points of top-1 that pre-training is worth."""
    pairs = {
        "finetune_minus_scratch": ("finetune", "scratch"),
        "probe_minus_random": ("probe_pretrained", "probe_random"),
    }
    return {n: found[a]["mean"] - found[b]["mean"] for n, (a, b) in pairs.items() if a in found and b in found}


def draw(found: dict[str, Any], labels: str, path: Path) -> None:
    """Validation top-1 over steps of every seed, both arms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, colour in (("finetune", "tab:blue"), ("scratch", "tab:orange")):
        for number, points in enumerate(found.get(name, {}).get("curves", [])):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, marker=".", label=f"{name} (3 seeds)" if number == 0 else None)
    axes.axhline(100 / 24, color="0.6", linewidth=1, linestyle=":", label="chance")
    axes.set(xlabel="step of 32 scenes", ylabel="validation top-1 (%)", title=f"drawn scenes, 24 classes ({labels})")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    protocol = tyro.cli(Protocol)
    found = gather(protocol)
    found["differences_points"] = differences(found)
    print(json.dumps({k: v for k, v in found.items() if k != "curves"}, indent=1))
    if protocol.record is not None:
        device = engine.start_world(protocol.device).device
        settings = {k: v for k, v in dataclasses.asdict(protocol).items() if k not in ("output", "record", "cache_dir")}
        record = {"subject": "finetune", "data": NOTICE, "settings": settings, "results": found,
                  "machine": machine.environment(device)}  # fmt: skip
        protocol.record.write_text(json.dumps(record, indent=1, default=str) + "\n")
        if "finetune" in found or "scratch" in found:
            draw(found, protocol.labels, protocol.record.with_suffix(".png"))
        print(f"wrote {protocol.record}")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
