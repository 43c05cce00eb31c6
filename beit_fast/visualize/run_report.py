"""A run folder as one page: `report.html` holds everything it shows and needs nothing from elsewhere."""

from __future__ import annotations

import base64
import contextlib
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from beit_fast.visualize import charts
from beit_fast.visualize.charts import Series, line_chart

CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss", "held_out_loss", "validation_loss", "token_entropy_nats", "pixel_variance",
              "other_context_loss")),
    ("accuracy, share of masked patches", ("accuracy", "held_out_accuracy")),
    ("top-1 and top-5, %", ("train_top1_percent", "top1_percent", "top5_percent")),
    ("mean IoU, mean and pixel accuracy, %", ("mean_iou_percent", "mean_accuracy_percent", "pixel_accuracy_percent",
                                              "train_pixel_accuracy_percent")),
    ("learning rate", ("lr",)),
    ("gradient norm before clipping", ("grad_norm",)),
    ("images per second", ("images_per_s",)),
    ("share of the time spent waiting for data", ("data_wait_share",)),
    ("skipped steps (gradient not finite), per interval", ("skipped_steps",)),
    ("bad images so far", ("bad_images",)),
    ("peak memory, MiB", ("peak_memory_mib",)),
    ("loss scale", ("loss_scale",)),
    ("mean absolute error of pixels", ("mae",)),
)  # fmt: skip
"""Titles and the metrics drawn together; what a run does not have is left out."""
REFERENCES = {"token_entropy_nats", "pixel_variance", "other_context_loss"}
"""What others are to be compared with; dashed."""


class Run(NamedTuple):
    """What a run folder holds, as far as it is there and readable."""

    path: Path
    task: str
    config: dict[str, Any]
    """Dotted names."""
    starts: list[dict[str, Any]]
    metrics: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def series(self, metric: str, name: str | None = None) -> Series:
        """The metric over steps; empty where the run has none."""
        points = [(line["step"], line[metric]) for line in self.metrics if line.get(metric) is not None]
        steps, values = [x for x, _ in points], [y for _, y in points]
        return Series(name or metric.replace("_", " "), steps, values, metric in REFERENCES)


def read_run(path: Path) -> Run:
    """Raises ValueError where there is no run to report on."""
    if not (path / "metrics.jsonl").is_file():
        raise ValueError(f"{path} is not a run folder: it holds no metrics.jsonl")
    metrics = []
    for text in (path / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # a last line that a kill cut short
            metrics.append(json.loads(text))
    saved, environment = _json(path / "config.json"), _json(path / "environment.json")
    return Run(path, str(saved.get("task", "run")), _flat(saved.get("config", {})), environment.get("starts", []),
               metrics)  # fmt: skip


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` of a run, finished or not, into its folder; returns its path.

    Curves, the histogram of the visual tokens, the newest pictures of `pictures/` and those beside the metrics,
    configuration and environment. ValueError where there is no run.
    """
    run = read_run(run_dir)
    figures = [line_chart(title, [run.series(metric) for metric in names]) for title, names in CHARTS]
    last = _last_values(run)
    parts = [
        f"<h1>{escape(run.name)}</h1><p>{escape(_headline(run))}</p>",
        _section("Curves", "".join(figures), "grid"),
        _section("Visual tokens", _tokens(run), "grid"),
        _section("Pictures", _gallery(run_dir)),
        _section("Last values", _table([(k, _value(v)) for k, v in last.items()], ("metric", "value"))),
        _section("Configuration", _details(_table([(k, _value(v)) for k, v in run.config.items()], ("field", "value")),
                                           f"{len(run.config)} fields")),
        _section("Environment", "".join(_start(start) for start in run.starts)),
    ]  # fmt: skip
    path = run_dir / "report.html"
    path.write_text(_page(f"{run.name}: {run.task}", "".join(parts)))
    return path


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Writes one page that lays the curves of several runs over each other; returns `path`.

    Below them: the last values side by side, and the fields in which the configurations differ. ValueError where a
    folder is no run.
    """
    runs = [read_run(each) for each in run_dirs]
    names = _distinct_names(runs)
    figures = []
    for title, metrics in CHARTS:
        for metric in metrics:
            series = [run.series(metric, name)._replace(dashed=False) for run, name in zip(runs, names, strict=True)]
            label = title if len(metrics) == 1 else metric.replace("_", " ")
            figures.append(line_chart(label, series))
    last = [_last_values(run) for run in runs]
    metrics_found = list(dict.fromkeys(name for values in last for name in values))
    rows = [(metric, *(_value(values.get(metric, "")) for values in last)) for metric in metrics_found]
    fields = list(dict.fromkeys(name for run in runs for name in run.config))
    differing = [
        (name, *(_value(run.config.get(name, "")) for run in runs))
        for name in fields
        if len({json.dumps(run.config.get(name)) for run in runs}) > 1
    ]
    parts = [
        f"<h1>{len(runs)} runs</h1><p>{escape(', '.join(names))}</p>",
        _section("Curves", "".join(figures), "grid"),
        _section("Last values", _table(rows, ("metric", *names))),
        _section("Where the configurations differ", _table(differing, ("field", *names))),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page("comparison of runs", "".join(parts)))
    return path


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """Folder names, with as many of their parents as it takes to tell them apart."""
    parts = [run.path.resolve().parts for run in runs]
    for depth in range(1, max(len(each) for each in parts) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def _headline(run: Run) -> str:
    steps = [line["step"] for line in run.metrics]
    total = run.config.get("steps") or run.config.get("max_steps")
    text = f"{run.task}, step {max(steps, default=0):,}" + (f" of {total:,}" if total else "")
    if run.starts:
        start = run.starts[-1]
        text += f"; {start.get('device')} x {start.get('world_size')}, started {start.get('time')}"
        text += f", {len(run.starts)} starts" if len(run.starts) > 1 else ""
    return text


def _last_values(run: Run) -> dict[str, Any]:
    """The newest value of every metric."""
    found: dict[str, Any] = {}
    for line in run.metrics:
        found |= {name: value for name, value in line.items() if name != "kind" and value is not None}
    return found


def _tokens(run: Run) -> str:
    """Perplexity of the visual tokens over steps, and how often the tokens occur, both on held-out images."""
    entropy = run.series("token_entropy_nats")
    perplexity = Series("perplexity of the tokens", entropy.x, [math.exp(y) for y in entropy.y if y is not None])
    sizes = ["held_out_perplexity", *sorted(n for n in _last_values(run) if n.startswith("held_out_perplexity_"))]
    charts_found = [
        line_chart("perplexity of the visual tokens on held-out images", [perplexity, *(run.series(n) for n in sizes)])
    ]
    found = _json(run.path / "pictures" / "token_histogram.json")
    if found:
        counts = found["counts"]
        title = f"{len(counts):,} of {found['vocab_size']:,} tokens occur in {found['images']:,} held-out images"
        ranks = Series("occurrences", list(range(1, len(counts) + 1)), counts)
        charts_found.append(line_chart(title, [ranks], "rank of the token", log_x=True, log_y=True))
    return "".join(charts_found)


def _gallery(run_dir: Path) -> str:
    """The newest picture of each kind, the older ones folded away."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted((run_dir / "pictures").glob("*.png")):
        kinds.setdefault(path.stem.split("_step_")[0], []).append(path)
    for path in sorted(run_dir.glob("*.png")):
        kinds.setdefault(path.stem, []).append(path)
    parts = []
    for kind, paths in kinds.items():
        older = "".join(_picture(path) for path in _some(paths[:-1]))
        folded = _details(older, "earlier in the run") if older else ""
        parts.append(f"<h3>{escape(kind.replace('_', ' '))}</h3>{_picture(paths[-1])}{folded}")
    return "".join(parts)


def _some(paths: list[Path]) -> list[Path]:
    """At most four, evenly spread."""
    return paths if len(paths) <= 4 else [paths[round(n * (len(paths) - 1) / 3)] for n in range(4)]


def _picture(path: Path) -> str:
    step = path.stem.partition("_step_")[2].lstrip("0")
    caption = f"step {int(step):,}" if step.isdigit() else path.name
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure class="picture"><img alt="{escape(path.stem)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _start(start: dict[str, Any]) -> str:
    rows = [(key, _value(value)) for key, value in start.items()]
    return _details(_table(rows, ("", "")), f"start at step {start.get('step', 0):,}, {start.get('time', '')}")


def _section(title: str, content: str, kind: str = "") -> str:
    return f'<section><h2>{escape(title)}</h2><div class="{kind}">{content}</div></section>' if content else ""


def _details(content: str, summary: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    if not rows:
        return ""
    heading = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{heading}</tr>{body}</table></div>'


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return " ".join(value)
    return json.dumps(value) if isinstance(value, (dict, list)) or value is None else str(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        result |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return result


def _colours(values: Sequence[str]) -> str:
    return " ".join(f"--s{number}: {value};" for number, value in enumerate(values))


_STYLE = (
    ":root { color-scheme: light dark; --page: #f6f6f4; --panel: #ffffff; --ink: #1c1c1a; --faint: #5f5f5a; "
    f"--rule: #e3e3de; {_colours(charts.LIGHT)} }}\n"
    "@media (prefers-color-scheme: dark) { :root { --page: #151517; --panel: #1f2023; --ink: #ececea; "
    f"--faint: #a3a39e; --rule: #36373b; {_colours(charts.DARK)} }} }}\n"
    """
body { margin: 0 auto; padding: 1.5rem; max-width: 1200px; background: var(--page); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; font-weight: 500; margin: 1rem 0 .4rem; }
p, figcaption, summary { color: var(--faint); } figcaption { font-size: .8rem; } figcaption i { font-style: normal; }
figcaption span { white-space: nowrap; margin-right: .8rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 1rem; }
figure { margin: 0; } .picture img { max-width: 100%; border-radius: 6px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; background: var(--panel); }
td, th { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid var(--rule); vertical-align: top;
         overflow-wrap: anywhere; }
details { margin: .4rem 0; } summary { cursor: pointer; }
""" + charts.STYLE
)


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )
