"""Pictures of a run folder, from its metrics.jsonl."""

import contextlib
import json
from pathlib import Path
from typing import Any


def loss_picture(run_dir: Path) -> Path:
    """Draw loss (training, and held-out where there is one) over optimizer steps into `run_dir/loss.png`.

    Returns the picture's path. The learning rate is drawn along, in grey, on an axis of its own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: list[dict[str, Any]] = []
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # a last line that a kill cut short
            lines.append(json.loads(text))
    train = [line for line in lines if line.get("kind") == "train" and line["loss"] is not None]
    figure = Figure(figsize=(8, 4.5))
    figure.subplots_adjust(left=0.09, right=0.88, bottom=0.12, top=0.92)  # a constrained layout draws it three times
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [line["step"] for line in train], [line["loss"] for line in train], marker="." if len(train) < 50 else None
    )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target)", title=run_dir.name)
    axes.grid(alpha=0.3)
    held_out = [line for line in lines if line.get("kind") == "evaluation"]
    names = sorted({name for line in held_out for name in line if name.endswith(("_loss", "_nats"))})
    for name in names:
        points = [(line["step"], line[name]) for line in held_out if line.get(name) is not None]
        axes.plot(
            [x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=name.replace("_", " ")
        )
    if names:
        axes.legend()
    rate = axes.twinx()
    rate.plot([line["step"] for line in train], [line["lr"] for line in train], color="0.7", linewidth=1, zorder=0)
    rate.set_ylabel("learning rate", color="0.5")
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=120)
    return path
