"""The record of a study, a line of JSON per finished run, and what can be said from it.

Differences are paired by seed, with Student's 95 % interval over the seeds.
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.protocol import BASE, ROWS, Row

MEASURES = {"finetune": "fine-tuning", "probe": "linear probe", "knn": "k nearest neighbours"}


class Record:
    """JSON lines: the settings first, then a line per finished run, never the same one twice.

    Raises:
        ValueError: the file was made with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        settings = json.loads(json.dumps(settings))
        path.parent.mkdir(parents=True, exist_ok=True)
        first = next(self.lines(), None)
        if first is None:
            self.append({"kind": "study", "settings": settings})
        elif first["settings"] != settings:
            raise ValueError(f"{path} was made with other settings; repeat them, or give another --output")

    def lines(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            yield from (json.loads(text) for text in self.path.read_text().splitlines())

    def append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The line with these values, or None."""
        return next((line for line in self.lines() if all(line.get(k) == v for k, v in key.items())), None)

    def by_seed(self, kind: str, row: str, labels: str, value: str = "top1_percent") -> dict[int, float]:
        """Measured on the test set: seed -> top-1 in percent, or another value."""
        return {
            line["seed"]: line[value]
            for line in self.lines()
            if (line["kind"], line.get("row"), line.get("labels"), line.get("set")) == (kind, row, labels, "test")
        }


def t_quantile(level: float, freedom: int) -> float:
    """The point below which Student's t with so many degrees of freedom lies with probability `level` (>= 0.5)."""
    # x = sqrt(n) tan(a) turns the density into cos(a)^(n - 1), on a finite interval
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp((2 * level - 1) * below[-1], below, angles)))


@dataclass(frozen=True)
class Difference:
    """Mean paired difference over seeds, in points."""

    mean: float
    sd: float
    seeds: int

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval; infinite with one seed."""
        if self.seeds < 2:
            return math.inf
        return t_quantile(0.975, self.seeds - 1) * self.sd / math.sqrt(self.seeds)

    def seeds_needed(self, most: int = 200) -> int | None:
        """Fewest seeds with which this mean and spread give an interval without 0 in four of five studies."""
        for n in range(2, most):
            if (t_quantile(0.975, n - 1) + t_quantile(0.8, n - 1)) * self.sd / math.sqrt(n) <= abs(self.mean):
                return n
        return None

    def verdict(self, expected: float | None) -> str:
        """Whether an ordering of that sign holds: confirmed, refuted, or open with the seeds it would need."""
        if expected is None:
            return ""
        if self.seeds < 2:
            return "open: one seed gives no interval"
        if abs(self.mean) > self.half:
            return "confirmed" if (self.mean > 0) == (expected > 0) else "refuted"
        needed = self.seeds_needed()
        return f"open: {needed} seeds needed" if needed else "open: over 200 seeds needed"


def difference(values: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Of the seeds that both have; None where there is none."""
    pairs = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    if not pairs:
        return None
    return Difference(statistics.mean(pairs), statistics.stdev(pairs) if len(pairs) > 1 else 0.0, len(pairs))


def table(record: Record, kind: str, labels: str) -> str:
    """Markdown: every row that was measured, and its difference to the first."""
    lines = [
        "| row | top-1, % (mean ± sd, seeds) | difference (95 % interval) | difference in the paper | ordering |",
        "|---|---|---|---|---|",
    ]
    base = record.by_seed(kind, BASE, labels)
    for name, row in ROWS.items():
        if values := record.by_seed(kind, name, labels):
            lines.append(_line(row, values, None if name == BASE else difference(values, base)))
    return "\n".join(lines) + "\n"


def _line(row: Row, values: Mapping[int, float], found: Difference | None) -> str:
    numbers = list(values.values())
    spread = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    cells = (
        row.label, f"{statistics.mean(numbers):.2f}{spread}, {len(numbers)}", interval(found),
        "" if row.paper is None else f"{row.paper:+.2f}", "" if found is None else found.verdict(row.paper)
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def interval(found: Difference | None) -> str:
    if found is None:
        return ""
    return f"{found.mean:+.2f}" + (f" ± {found.half:.2f}" if found.seeds > 1 else " (one seed)")


def curves(record: Record, row: str, labels: str) -> dict[int, list[tuple[int, float]]]:
    """Seed -> (step, top-1 in percent) while fine-tuning."""
    found: Any = record.by_seed("finetune", row, labels, "curve")
    return dict(found)


def convergence(record: Record, labels: str) -> str:
    """A line: accuracy averaged over the course of fine-tuning against that of training from scratch, equal steps."""
    means = [
        {seed: statistics.mean(value for _, value in curve) for seed, curve in curves(record, row, labels).items()}
        for row in (BASE, "scratch")
    ]
    found = difference(*means)
    if found is None:
        return "not measured yet"
    return f"{interval(found)} points of top-1, averaged over the course: {found.verdict(1.0)}"


def report(record: Record) -> str:
    """Markdown: the tables of everything that was measured, and convergence."""
    parts = []
    for labels, title in (("scenes", "6 shapes x 4 textures"), ("hues", "6 shapes x 4 hues")):
        for kind, name in MEASURES.items():
            if record.by_seed(kind, BASE, labels) or record.by_seed(kind, "scratch", labels):
                parts.append(f"## {name}, {title}\n\n{table(record, kind, labels)}")
        if curves(record, BASE, labels):
            text = convergence(record, labels)
            parts.append(f"Faster than from scratch ({title}): {text}.\n")
    losses = [line for line in record.lines() if line["kind"] == "pretrain"]
    if losses:
        head = "| row | seed | loss | without input | other context |\n|---|---|---|---|---|"
        lines = "\n".join([head, *map(_pretraining, losses)])
        parts.append(f"## Pre-training, held-out scenes\n\n{lines}\n")
    return "\n".join(parts)


def _pretraining(line: Mapping[str, Any]) -> str:
    metrics = line["metrics"]
    without = metrics.get("token_entropy_nats", metrics.get("pixel_variance"))
    other = metrics.get("other_context_loss")
    unit = "nats" if "token_entropy_nats" in metrics else "squared error"
    cells = (
        ROWS[line["row"]].label, str(line["seed"]), f"{metrics['held_out_loss']:.3f} {unit}", f"{without:.3f}",
        "" if other is None else f"{other:.3f}"
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def draw(record: Record, path: Path) -> None:
    """Test accuracy over the steps of fine-tuning, mean over seeds and its 95 % interval, a panel per set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets = [labels for labels in ("scenes", "hues") if any(curves(record, row, labels) for row in ROWS)]
    figure = Figure(figsize=(6 * max(len(sets), 1), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for number, labels in enumerate(sets, start=1):
        axes = figure.add_subplot(1, len(sets), number)
        for name, row in ROWS.items():
            if by_seed := curves(record, name, labels):
                steps = [step for step, _ in next(iter(by_seed.values()))]
                values = np.array([[value for _, value in curve] for curve in by_seed.values()])
                (line,) = axes.plot(steps, values.mean(0), marker=".", label=f"{row.label} ({len(values)} seeds)")
                if len(values) > 1:
                    half = t_quantile(0.975, len(values) - 1) * values.std(0, ddof=1) / len(values) ** 0.5
                    low, high = values.mean(0) - half, values.mean(0) + half
                    axes.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
        axes.axhline(100 / 24, color="0.6", linewidth=1, linestyle=":", label="chance")
        textures = "textures" if labels == "scenes" else "hues"
        axes.set(xlabel="step of 32 scenes", ylabel="test top-1 (%)", title=f"6 shapes x 4 {textures}", ylim=(0, None))
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
