"""Label maps in colour: over their image, and side by side with it."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from beit_fast.visualize.pictures import class_legend, sheet

if TYPE_CHECKING:
    from PIL import Image

UNLABELLED = (90, 90, 90)
Pixels = NDArray[np.uint8]
Classes = NDArray[np.integer]


def palette(count: int) -> Pixels:
    """Choose (count, 3) colours: hues a golden angle apart, so that neighbours differ most, in changing brightness."""
    shades = ((0.75, 0.95), (0.55, 0.65), (0.35, 0.95), (0.9, 0.7), (0.6, 0.85))
    colours = [colorsys.hsv_to_rgb((0.62 + 0.618034 * k) % 1.0, *shades[k % len(shades)]) for k in range(count)]
    return np.rint(255 * np.array(colours).reshape(-1, 3)).astype(np.uint8)


def coloured(classes: Classes, count: int) -> Pixels:
    """Colour class numbers (H, W) as (H, W, 3); negative ones, which are not scored, in grey."""
    table = np.concatenate([palette(count), np.array([UNLABELLED], np.uint8)])
    return table[np.where(classes < 0, count, classes)]


def overlay(pixels: Pixels, classes: Classes, count: int, opacity: float) -> Pixels:
    """Lay class numbers (H, W), as colours, over an image (H, W, 3)."""
    mixed = (1 - opacity) * pixels.astype(np.float32) + opacity * coloured(classes, count)
    return np.rint(mixed).astype(np.uint8)


def side_by_side(rows: Sequence[tuple[Pixels, Classes | None, Classes]], names: Sequence[str]) -> Image.Image:
    """Lay out image (H, W, 3), label (H, W) or None and prediction (H, W) of each row; below, the colours that occur.

    A label is drawn where every row has one.
    """
    labelled = all(label is not None for _, label, _ in rows)
    lines = []
    for pixels, label, prediction in rows:
        maps = [label, prediction] if label is not None and labelled else [prediction]
        lines.append([pixels, *(coloured(classes, len(names)) for classes in maps)])
    occurring = [classes for _, label, prediction in rows for classes in (label, prediction) if classes is not None]
    columns = ["image", "label", "prediction"] if labelled else ["image", "prediction"]
    return _sheet(lines, columns, occurring, names)


def overlay_sheet(pixels: Pixels, classes: Classes, names: Sequence[str], opacity: float) -> Image.Image:
    """Lay out an image (H, W, 3) and the overlay of its classes (H, W); below, the colours that occur."""
    over = overlay(pixels, classes, len(names), opacity)
    return _sheet([[pixels, over]], ["image", "classes"], [classes], names)


def _sheet(
    rows: Sequence[Sequence[Pixels]], columns: Sequence[str], occurring: Sequence[Classes], names: Sequence[str]
) -> Image.Image:
    numbers = sorted({int(n) for classes in occurring for n in np.unique(classes) if n >= 0})
    colours = palette(len(names)).tolist()
    legend = class_legend([(names[n], tuple(colours[n])) for n in numbers], max(len(row) for row in rows) * 246)
    images = [[torch.from_numpy(part).permute(2, 0, 1) / 255 for part in row] for row in rows]
    return sheet(images, columns, 240, legend)
