"""A run folder as one page: `report.html` holds everything it shows and needs nothing from elsewhere."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from beit_fast.visualize.charts import Series, line_chart


class Chart(NamedTuple):
    """Metrics that are drawn together; what a run does not have is left out."""

    title: str
    metrics: tuple[str, ...]
    from_zero: bool = False


CHARTS = (
    Chart("loss", ("loss", "held_out_loss", "validation_loss", "token_entropy_nats", "pixel_variance",
                   "other_context_loss")),
    Chart("accuracy, share of masked patches", ("accuracy", "held_out_accuracy"), True),
    Chart("top-1 and top-5, %", ("train_top1_percent", "top1_percent", "top5_percent")),
    Chart("k-NN and linear probe on labelled images, top-1, %", ("knn_top1_percent", "probe_top1_percent")),
    Chart("mean IoU, mean and pixel accuracy, %",
          ("mean_iou_percent", "mean_accuracy_percent", "pixel_accuracy_percent", "train_pixel_accuracy_percent")),
    Chart("learning rate", ("lr",), True),
    Chart("gradient norm before clipping", ("grad_norm",), True),
    Chart("images per second", ("images_per_s",), True),
    Chart("share of the time spent waiting for data", ("data_wait_share",), True),
    Chart("skipped steps (gradient not finite), per interval", ("skipped_steps",), True),
    Chart("bad images so far", ("bad_images",), True),
    Chart("peak memory, MiB", ("peak_memory_mib",), True),
    Chart("loss scale", ("loss_scale",), True),
    Chart("mean absolute error of pixels", ("mae",), True),
)  # fmt: skip
REFERENCES = {"token_entropy_nats", "pixel_variance", "other_context_loss"}
"""Metrics to compare others with; dashed."""


STARTING = {"knn_top1_percent", "probe_top1_percent"}
"""Metrics whose value before the first step is what the later ones are compared with."""


class Run(NamedTuple):
    """What a run folder holds, as far as it is there and readable."""

    path: Path
    task: str
    config: dict[str, Any]
    """Dotted names."""
    starts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    data: dict[str, Any]
    """Dotted names; what data.json says of the images."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def last(self) -> dict[str, Any]:
        """The newest value of every metric."""
        return {name: value for line in self.metrics for name, value in line.items()
                if name != "kind" and value is not None}  # fmt: skip

    def series(self, metric: str, name: str | None = None) -> Series:
        """The metric over steps; empty where the run has none."""
        points = [(line["step"], line[metric]) for line in self.metrics if _is_number(line.get(metric))]
        steps, values = [x for x, _ in points], [y for _, y in points]
        return Series(name or metric.replace("_", " "), steps, values, metric in REFERENCES)

    def start_of(self, metric: str) -> Series:
        """What the run started from, drawn through to its end; empty where that was not measured."""
        own = self.series(metric)
        name = f"{own.name}, starting weights"
        if metric not in STARTING or not own.x or own.x[0] != 0:
            return Series(name, [], [], True)
        last = max(line["step"] for line in self.metrics)
        return Series(name, [0, last], [own.y[0]] * 2, True)


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: there is no run to report on.
    """
    if not (path / "metrics.jsonl").is_file():
        raise ValueError(f"{path} is not a run folder: it holds no metrics.jsonl")
    metrics = []
    for text in (path / "metrics.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # torn by a kill, or written by another program
            line = json.loads(text)
            if isinstance(line, dict) and _is_number(line.get("step")):
                metrics.append(line)
    saved, starts = _json(path / "config.json"), _json(path / "environment.json").get("starts", [])
    starts = [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    config, data = _flat(saved.get("config", {})), _flat(_json(path / "data.json"))
    return Run(path, str(saved.get("task", "run")), config, starts, metrics, data)


def write_report(run_dir: Path) -> Path:
    """Write `report.html` of a run, finished or not, into its folder.

    It shows curves, the histogram of the visual tokens, the newest pictures of `pictures/` and those in the run
    folder, the data, the configuration and the environment.

    Returns:
        its path.

    Raises:
        ValueError: there is no run.
    """
    run = read_run(run_dir)
    figures = [
        line_chart(title, [series for m in metrics for series in (run.series(m), run.start_of(m))], from_zero=zero)
        for title, metrics, zero in CHARTS
    ]
    settings = _details(_table(run.config.items(), ("field", "value")), f"{len(run.config)} fields")
    parts = [
        f"<h1>{escape(run.name)}</h1><p>{escape(_headline(run))}</p>",
        _section("Curves", "".join(figures), "grid"),
        _section("Visual tokens", _tokens(run), "grid"),
        _section("Pictures", _gallery(run_dir)),
        _section("Last values", _table(run.last.items(), ("metric", "value"))),
        _section("Data", _table(run.data.items(), ("", ""))),
        _section("Configuration", settings),
        _section("Environment", "".join(_start(start) for start in run.starts)),
    ]
    path, work = run_dir / "report.html", run_dir / ".tmp-report.html"
    work.write_text(_page(f"{run.name}: {run.task}", "".join(parts)), errors="surrogateescape")
    return work.replace(path)  # whole or not at all


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write one page that draws the curves of several runs over each other.

    Below them: the last values side by side, and the fields in which the configurations differ.

    Returns:
        `path`.

    Raises:
        ValueError: a folder is no run.
    """
    runs = [read_run(each) for each in run_dirs]
    names = _distinct_names(runs)
    figures = []
    for title, metrics, zero in CHARTS:
        for metric in metrics:
            series = [run.series(metric, name)._replace(dashed=False) for run, name in zip(runs, names, strict=True)]
            figures.append(line_chart(title if len(metrics) == 1 else metric.replace("_", " "), series, from_zero=zero))
    last, configs = _side_by_side([run.last for run in runs]), _side_by_side([run.config for run in runs])
    differing = [row for row in configs if len({json.dumps(value) for value in row[1:]}) > 1]
    parts = [
        f"<h1>{len(runs)} runs</h1><p>{escape(', '.join(names))}</p>",
        _section("Curves", "".join(figures), "grid"),
        _section("Last values", _table(last, ("metric", *names))),
        _section("Where the configurations differ", _table(differing, ("field", *names))),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page("comparison of runs", "".join(parts)), errors="surrogateescape")
    return path


def _side_by_side(values: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A row for each name that occurs: the name, then its value in each of the dicts, "" where it has none."""
    names = dict.fromkeys(name for each in values for name in each)
    return [(name, *(each.get(name, "") for each in values)) for name in names]


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """Folder names, with as many of their parents as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    for depth in range(1, max(len(each) for each in parts) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _headline(run: Run) -> str:
    total = run.config.get("steps") or run.config.get("max_steps")
    text = f"{run.task}, step {max((line['step'] for line in run.metrics), default=0):,}"
    text += f" of {total:,}" if total else ""
    if run.starts:
        start = run.starts[-1]
        text += f"; {start.get('device')} x {start.get('world_size')}, started {start.get('time')}"
        text += f", {len(run.starts)} starts" if len(run.starts) > 1 else ""
    return text


def _tokens(run: Run) -> str:
    """Perplexity of the visual tokens over steps, and how often the tokens occur, both on held-out images."""
    entropy = run.series("token_entropy_nats")
    perplexity = Series("perplexity of the tokens", entropy.x, [math.exp(y) for y in entropy.y if y is not None])
    sizes = ["held_out_perplexity", *sorted(n for n in run.last if n.startswith("held_out_perplexity_"))]
    series = [perplexity, *(run.series(n) for n in sizes)]
    figures = line_chart("perplexity of the visual tokens on held-out images", series, from_zero=True)
    histogram = _json(run.path / "pictures" / "token_histogram.json")
    if histogram:
        counts = histogram["counts"]
        title = (
            f"{len(counts):,} of {histogram['vocab_size']:,} tokens occur in {histogram['images']:,} held-out images"
        )
        ranks = Series("occurrences", list(range(1, len(counts) + 1)), counts)
        figures += line_chart(title, [ranks], "rank of the token", log_x=True, log_y=True)
    return figures


def _gallery(run_dir: Path) -> str:
    """The newest picture of each kind, the older ones folded away."""
    kinds: dict[str, list[Path]] = {}
    for path in [*sorted((run_dir / "pictures").glob("*.png")), *sorted(run_dir.glob("*.png"))]:
        kinds.setdefault(path.stem.split("_step_")[0], []).append(path)
    parts = []
    for kind, (*older, newest) in kinds.items():
        spread = older if len(older) <= 4 else [older[round(n * (len(older) - 1) / 3)] for n in range(4)]
        folded = _details("".join(_picture(path) for path in spread), "earlier in the run") if older else ""
        parts.append(f"<h3>{escape(kind.replace('_', ' '))}</h3>{_picture(newest)}{folded}")
    return "".join(parts)


def _picture(path: Path) -> str:
    """As wide as the page, but at most its own size and at least half of it, up to 700 pixels."""
    step = path.stem.partition("_step_")[2]
    caption = f"step {int(step):,}" if step.isdigit() else path.name
    content = path.read_bytes()
    width = int.from_bytes(content[16:20])  # in the header of every PNG
    return (
        f'<figure><div class="picture"><img alt="{escape(path.stem)}" style="max-width: {width}px; min-width: '
        f'{min(width // 2, 700)}px" src="data:image/png;base64,{base64.b64encode(content).decode()}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _start(start: dict[str, Any]) -> str:
    return _details(_table(start.items(), ("", "")), f"start at step {start.get('step', 0):,}, {start.get('time', '')}")


def _section(title: str, content: str, kind: str = "") -> str:
    return f'<section><h2>{escape(title)}</h2><div class="{kind}">{content}</div></section>' if content else ""


def _details(content: str, summary: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _table(rows: Iterable[Sequence[Any]], head: Sequence[str]) -> str:
    """A name and its values in each row."""
    body = ["<tr>" + "".join(f"<td>{escape(_value(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><tr>{heading}</tr>{"".join(body)}</table></div>' if body else ""


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return " ".join(value)
    return json.dumps(value) if isinstance(value, (dict, list)) or value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    if not isinstance(value, dict):
        return result
    for key, item in value.items():
        result |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return result


def _page(title: str, body: str) -> str:
    style = Path(__file__).with_name("report.css").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>{body}</body></html>\n"
    )
