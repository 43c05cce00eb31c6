"""Classification accuracy: top-1, top-5, per class, and what is taken for what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from beit_fast.data.classification import EvaluationLoader
from beit_fast.data.sources.writing import naming, write_text
from beit_fast.train.distributed.world import World
from beit_fast.visualize.pictures import printable

CONFUSION_CLASSES = 1000
"""Up to this number of classes the whole confusion matrix is kept."""


@dataclass(frozen=True)
class Evaluation:
    """What a classifier made of a labelled set; every image counts once, on however many devices."""

    classes: tuple[str, ...]
    images: NDArray[np.int64]
    """(C,) images of each class."""
    top1: NDArray[np.int64]
    """(C,) of them classified right."""
    top5: NDArray[np.int64]
    """(C,) of them with the right class among the first five."""
    loss: float
    """Mean cross-entropy in nats."""
    confusion: NDArray[np.int64] | None
    """(C, C) images of class i taken for class j; None above `CONFUSION_CLASSES` classes."""

    def metrics(self) -> dict[str, float]:
        total = int(self.images.sum())
        return {
            "validation_loss": self.loss,
            "top1_percent": 100 * int(self.top1.sum()) / total,
            "top5_percent": 100 * int(self.top5.sum()) / total,
            "validation_images": total,
        }

    def write(self, folder: Path) -> list[Path]:
        """`per_class.tsv`, the worst class first, and `confusion.png`; returns their paths."""
        share = self.top1 / np.maximum(self.images, 1)
        rows = ["class\timages\ttop1_percent\ttop5_percent\tmost_often_taken_for"]
        for number in np.argsort(share, kind="stable"):
            count = int(self.images[number])
            if not count:
                continue
            percents = (f"{100 * int(hits[number]) / count:.2f}" for hits in (self.top1, self.top5))
            rows.append("\t".join([self.classes[number], str(count), *percents, self._taken_for(int(number))]))
        table = folder / "per_class.tsv"
        write_text(table, "\n".join(rows) + "\n")
        return [table] if self.confusion is None else [table, self._picture(folder / "confusion.png")]

    def _taken_for(self, number: int) -> str:
        if self.confusion is None:
            return ""
        others = self.confusion[number].copy()
        others[number] = 0
        return f"{self.classes[int(others.argmax())]} ({int(others.max())})" if others.max() else ""

    def _picture(self, path: Path) -> Path:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        assert self.confusion is not None
        share = self.confusion / np.maximum(self.images, 1)[:, None]
        figure = Figure(figsize=(8, 7), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        picture = axes.imshow(100 * share, vmin=0, vmax=100, cmap="viridis", interpolation="nearest")
        figure.colorbar(picture, label="% of the true class")
        title = f"top-1 {100 * int(self.top1.sum()) / int(self.images.sum()):.2f} % of {int(self.images.sum())} images"
        axes.set(xlabel="taken for", ylabel="true class", title=title)
        if len(self.classes) <= 40:
            names = [printable(name) for name in self.classes]
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
            axes.set_yticks(range(len(names)), names, fontsize=7)
        with naming(path):
            figure.savefig(path, dpi=120)
        return path


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module, views: EvaluationLoader, classes: Sequence[str], batch_size: int, world: World,
    alive: Callable[[], None] = lambda: None,
) -> Evaluation:  # fmt: skip
    """Run `model` (already in evaluation mode, under whatever autocast) over its share of `views` and add up all ranks.

    Of equal logits that of the first class comes first. `alive` is called for each batch.

    Raises:
        ValueError: not one image could be used.
    """
    count = len(classes)
    keep = count <= CONFUSION_CLASSES
    sums = torch.zeros(3, count, dtype=torch.int64, device=world.device)
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    confusion = torch.zeros(count * count if keep else 0, dtype=torch.int64, device=world.device)
    for batch in views.batches(batch_size, world.rank, world.size):
        alive()
        logits = model(batch.images).float()
        loss += F.cross_entropy(logits, batch.labels, reduction="sum").double()
        first = logits.sort(dim=1, descending=True, stable=True).indices[:, :5]
        hits = first == batch.labels[:, None]
        sums[0] += torch.bincount(batch.labels, minlength=count)
        sums[1] += torch.bincount(batch.labels, hits[:, 0].double(), minlength=count).long()
        sums[2] += torch.bincount(batch.labels, hits.any(1).double(), minlength=count).long()
        if keep:
            confusion += torch.bincount(batch.labels * count + first[:, 0], minlength=count * count)
    for value in (sums, loss, confusion):
        world.sum(value)
    images, top1, top5 = sums.cpu().numpy()
    if not images.sum():
        raise ValueError("not one validation image could be used; bad files are named above")
    matrix = confusion.view(count, count).cpu().numpy() if keep else None
    return Evaluation(tuple(classes), images, top1, top5, float(loss) / int(images.sum()), matrix)
