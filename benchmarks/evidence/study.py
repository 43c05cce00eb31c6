"""An ablation study: pre-train each row, probe and fine-tune it on several labelled sets, one record, one table.

    main(Study(rows=...))

Every run is a run folder of its own and is continued where it was stopped. What has been measured is appended to the
record, a line of JSON per run, and is not run again, even if its folder is gone; the table is made from the record.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from beit_fast.cli.options import errors_in_one_line, parse
from beit_fast.cli.train import RUN_ERRORS
from beit_fast.data.builtin import NOTICE
from beit_fast.train import engine
from beit_fast.train.config import to_plain
from beit_fast.train.tasks.finetune import ClassifierModelConfig, Finetune, FinetuneConfig
from beit_fast.train.tasks.pretrain import MaskedImageModeling, ModelConfig, PretrainConfig
from beit_fast.train.tasks.probe import LinearProbe, ProbeConfig
from benchmarks.evidence import scene_protocol

Measure = Literal["probe", "finetune"]
TOP1: dict[str, str] = {"probe": "best_top1_percent", "finetune": "top1_percent"}
BASE_MODEL = scene_protocol.SHAPE | {"preset": "plain"}
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95 % points of Student's t by degrees of freedom."""


@dataclass(frozen=True)
class Row:
    """One line of the paper's tables."""

    label: str
    """As the paper names it."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted fields of the pre-training that differ from the first row; `model.*` differ in fine-tuning too."""
    length: float = 1.0
    """Factor on the steps of pre-training; 0 trains from random weights, with the steps of `Study.scratch_steps`."""
    paper: float | None = None
    """The paper's top-1 on ImageNet-1k in percent."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Ablations on drawn scenes with a small `plain` BEiT; the first row is what the others are compared with."""

    choices: tuple[tuple[str, Row], ...] = dataclasses.field(default=(), metadata={"free": True})
    rows: tuple[str, ...] = ()
    """Names of the rows to run."""
    measures: tuple[Measure, ...] = ("probe", "finetune")
    """What is asked of the pre-trained models: linear probes of the frozen blocks (the best one counts), fine-tuning
    as in the paper, or both."""
    output: Path = Path("runs/ablations")
    """Run folders of all rows."""
    record: Path | None = None
    """JSON lines; None: record.jsonl in the output folder."""
    seeds: int = 3
    """Labelled sets, orders and initial heads per row."""
    images: int = 16_000
    """Unlabelled scenes for pre-training."""
    pretrain_steps: int = 1500
    """Steps of pre-training, 32 scenes each."""
    labelled_images: int = 6000
    """Labelled training scenes per seed."""
    validation_images: int = 1500
    """Validation scenes, the same for all."""
    held_out: int = 600
    """Scenes on which pre-training is measured."""
    probe_epochs: int = 30
    """Epochs of the linear probes."""
    finetune_steps: int = 450
    """Steps of fine-tuning, 32 scenes each."""
    scratch_steps: int = 450
    """Steps of training from random weights."""
    rate: float = 1e-3
    """Learning rate of fine-tuning and of training from scratch."""
    layer_decay: float = 0.85
    """Of fine-tuning."""
    cache_dir: str | None = None
    """Where scenes are kept."""
    device: str = "auto"
    """Where to run."""
    threads: int = 1
    """Threads that make views."""

    def describe(self) -> str:
        """The settings in a line."""
        return (
            f"width 128, depth 4, plain, 64 px; {self.pretrain_steps:,} + {self.finetune_steps:,} steps, batch 32, "
            f"{self.seeds} seeds"
        )


class Measured(NamedTuple):
    """Top-1 of a row in percent, by fine-tuning seed."""

    name: str
    row: Row
    top1: dict[int, float]


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """`config` with dotted fields replaced; TypeError where there is no such field."""
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        config = dataclasses.replace(
            config, **{first: changed(getattr(config, first), {rest: value}) if rest else value}
        )
    return config


def pretraining(study: Study, name: str, row: Row) -> PretrainConfig:
    """The row's pre-training. All rows see the same views, so that their tokens are computed once."""
    shared = scene_protocol.common(study.output / name / "pretrain", study.device, 100)
    base = scene_protocol.pretraining(
        shared, ModelConfig(**BASE_MODEL), steps=round(study.pretrain_steps * row.length), images=study.images,
        held_out=study.held_out, cache_dir=study.cache_dir, threads=study.threads,
    )  # fmt: skip
    data = dataclasses.replace(base.data, view_cycle=2, token_cache=str(study.output / "tokens.cache"))
    config: PretrainConfig = changed(dataclasses.replace(base, data=data), row.changes)
    if config.objective.target == "pixels":  # no tokens to keep
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, token_cache=None))
    return config


def labelled_model(study: Study, name: str, row: Row, seed: int, measure: Measure) -> dict[str, Any]:
    """What probes and fine-tuning share: folder, model, its weights (None: random), labelled scenes."""
    model = {key.removeprefix("model."): value for key, value in row.changes.items() if key.startswith("model.")}
    return {
        "shared": scene_protocol.common(study.output / name / f"{measure}_seed{seed}", study.device, 50),
        "model": ClassifierModelConfig(**(BASE_MODEL | model)),
        "weights": str(study.output / name / "pretrain") if row.length else None,
        "seed": seed,
        "data": scene_protocol.labelled(
            seed, images=study.labelled_images, validation_images=study.validation_images, cache_dir=study.cache_dir,
            threads=study.threads,
        ),
    }  # fmt: skip


def probing(study: Study, name: str, row: Row, seed: int) -> ProbeConfig:
    """Probes of the row's pre-trained model, or of random weights."""
    return scene_protocol.probing(**labelled_model(study, name, row, seed, "probe"), epochs=study.probe_epochs)


def finetuning(study: Study, name: str, row: Row, seed: int) -> FinetuneConfig:
    """The row's fine-tuning, or its training from random weights."""
    return scene_protocol.classifying(
        **labelled_model(study, name, row, seed, "finetune"),
        steps=study.finetune_steps if row.length else study.scratch_steps, rate=study.rate,
        layer_decay=study.layer_decay, evaluations=1, scale=(1.0, 1.0),
    )  # fmt: skip


class Record:
    """JSON lines: the settings of each start, and a line per finished run, never the same one twice."""

    def __init__(self, path: Path, study: Study) -> None:
        self.path = path
        self.settings = {
            key: value
            for key, value in to_plain(study).items()
            if key not in ("choices", "rows", "output", "record", "cache_dir", "seeds", "measures", "threads", "device")
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [line for line in self.lines() if line["kind"] == "study"]
        if found and found[-1]["settings"] != self.settings:
            raise ValueError(f"{path} was made with other settings; repeat them, or give another --record")
        if not found:
            self._append({"kind": "study", "data": NOTICE, "settings": self.settings})

    def lines(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            yield from (json.loads(text) for text in self.path.read_text().splitlines())

    def has(self, kind: str, row: str, seed: int | None) -> bool:
        return any((line["kind"], line.get("row"), line.get("seed")) == (kind, row, seed) for line in self.lines())

    def add(self, kind: str, folder: Path, row: str, seed: int | None, metrics: dict[str, Any]) -> None:
        key = {"kind": kind, "row": row, "seed": seed}
        if self.has(kind, row, seed):
            return
        start = json.loads((folder / "environment.json").read_text())["starts"][-1]
        machine = {name: start[name] for name in ("device", "cpu_count", "torch_threads", "versions")}
        self._append({**key, "metrics": metrics, "machine": machine})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def measured(self, choices: Mapping[str, Row], measure: Measure) -> list[Measured]:
        """What the record holds of these rows, in their order."""
        found: dict[str, dict[int, float]] = {}
        for line in self.lines():
            if line["kind"] == measure:
                found.setdefault(line["row"], {})[line["seed"]] = line["metrics"][TOP1[measure]]
        return [Measured(name, row, found[name]) for name, row in choices.items() if name in found]


def run(study: Study) -> Record:
    """Run what the record lacks: the pre-training of every row first, then all rows on one labelled set after the
    other, first by probes, then by fine-tuning.
    """
    choices = dict(study.choices)
    if unknown := [name for name in study.rows if name not in choices]:
        raise ValueError(f"there is no row {unknown[0]!r}; choose from {', '.join(choices)}")
    record = Record(study.record or study.output / "record.jsonl", study)
    missing = [
        (measure, seed, name)
        for measure in study.measures
        for seed in range(study.seeds)
        for name in study.rows
        if not record.has(measure, name, seed)
    ]
    for name in study.rows:
        wanted = any(name == row for _, _, row in missing) or not record.has("pretrain", name, None)
        if choices[name].length and (wanted or not study.seeds):  # without seeds pre-training is all that is asked for
            config = pretraining(study, name, choices[name])
            record.add("pretrain", config.output_dir, name, None, _complete(MaskedImageModeling, config))
    for measure, seed, name in missing:
        asked = (study, name, choices[name], seed)
        if measure == "probe":
            probe = probing(*asked)
            record.add(measure, probe.output_dir, name, seed, _complete(LinearProbe, probe))
        else:
            fine = finetuning(*asked)
            record.add(measure, fine.output_dir, name, seed, _complete(Finetune, fine))
    return record


def _complete(task: Callable[[Any], Any], config: Any) -> dict[str, Any]:
    """Train to the end, or find it trained; the last metrics."""
    result = engine.run(task(config), config)
    if result.exit_code:
        raise SystemExit(result.exit_code)
    return result.metrics


def difference(row: Measured, base: Measured) -> tuple[float, float] | None:
    """Mean of the paired differences over seeds in points, and half the width of its 95 % interval (Student's t)."""
    pairs = [row.top1[seed] - base.top1[seed] for seed in sorted(row.top1.keys() & base.top1.keys())]
    if len(pairs) < 2 or len(pairs) - 1 not in T_95:
        return None
    return statistics.mean(pairs), T_95[len(pairs) - 1] * statistics.stdev(pairs) / math.sqrt(len(pairs))


def verdict(ours: tuple[float, float] | None, paper: float | None) -> str:
    """Whether the paper's ordering holds here, by the interval about our difference."""
    if ours is None or not paper:
        return ""
    mean, half = ours
    if abs(mean) <= half:
        return "not told apart"
    return "holds" if (mean > 0) == (paper > 0) else "reversed"


def table(measured: list[Measured], first: str) -> str:
    """Markdown: mean and standard deviation over seeds, the difference to the row `first`, the paper's beside them."""
    head = (
        "| row | top-1 here, % (mean ± sd, n) | difference here (95 %) | paper, % | difference there | ordering |\n"
        "|---|---|---|---|---|---|\n"
    )
    base = next((entry for entry in measured if entry.name == first), None)
    lines = []
    for entry in measured:
        values = list(entry.top1.values())
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        there = ours = None
        if base is not None and entry is not base:
            ours = difference(entry, base)
            if entry.row.paper is not None and base.row.paper is not None:
                there = entry.row.paper - base.row.paper
        cells = (
            entry.row.label, f"{statistics.mean(values):.2f}{spread}, {len(values)}",
            "" if ours is None else f"{ours[0]:+.2f} ± {ours[1]:.2f}",
            "not published" if entry.row.paper is None else f"{entry.row.paper:.2f}",
            "" if there is None else f"{there:+.2f}", verdict(ours, there),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return head + "\n".join(lines) + "\n"


def main(default: Study) -> None:
    """Run a recipe's study: its values, overridden by the command line; prints the table, keeps it as table.md."""
    study = parse(default, sys.argv[1:])
    with errors_in_one_line(more=RUN_ERRORS):
        record = run(study)
    tables = [
        f"{measure}:\n\n{table(measured, study.choices[0][0])}"
        for measure in study.measures
        if (measured := record.measured(dict(study.choices), measure))
    ]
    (study.output / "table.md").write_text("\n".join(tables))
    print("\n".join([NOTICE, "", *tables, f"record {record.path}"]))
