"""Label maps in colour: over their image, and side by side with it."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image

UNLABELLED = (90, 90, 90)
_GAP = 6


def palette(count: int) -> NDArray[np.uint8]:
    """(count, 3) colours: hues a golden angle apart, so that neighbours differ most, in changing brightness."""
    shades = ((0.75, 0.95), (0.55, 0.65), (0.35, 0.95), (0.9, 0.7), (0.6, 0.85))
    colours = [colorsys.hsv_to_rgb((0.62 + 0.618034 * k) % 1.0, *shades[k % len(shades)]) for k in range(count)]
    return np.rint(255 * np.array(colours).reshape(-1, 3)).astype(np.uint8)


def coloured(classes: NDArray[np.integer], count: int) -> NDArray[np.uint8]:
    """Class numbers (H, W) as colours (H, W, 3); negative ones, which count nowhere, in gray."""
    table = np.concatenate([palette(count), np.array([UNLABELLED], np.uint8)])
    return table[np.where(classes < 0, count, classes)]


def overlay(pixels: NDArray[np.uint8], classes: NDArray[np.integer], count: int, opacity: float) -> NDArray[np.uint8]:
    """Class numbers (H, W) as colours over an image (H, W, 3)."""
    mixed = (1 - opacity) * pixels.astype(np.float32) + opacity * coloured(classes, count)
    return np.rint(mixed).astype(np.uint8)


def side_by_side(
    rows: Sequence[tuple[NDArray[np.uint8], NDArray[np.integer] | None, NDArray[np.integer]]], names: Sequence[str]
) -> Image.Image:
    """One line per image: image (H, W, 3), label (H, W) or None, prediction (H, W); below, the colours that occur."""
    from PIL import Image, ImageDraw, ImageFont

    count, lines = len(names), []
    for pixels, label, prediction in rows:
        parts = [pixels, *([] if label is None else [coloured(label, count)]), coloured(prediction, count)]
        zoom = max(1, -(-240 // pixels.shape[0]))
        lines.append([np.kron(part, np.ones((zoom, zoom, 1), np.uint8)) for part in parts])
    shown = sorted({int(n) for _, *maps in rows for m in maps if m is not None for n in np.unique(m) if n >= 0})
    wide = max(sum(part.shape[1] + _GAP for part in line) + _GAP for line in lines)
    font = ImageFont.load_default(13)
    columns = max(1, wide // 170)
    legend = -(-len(shown) // columns) * 20 + _GAP
    titles = 20
    sheet = Image.new("RGB", (wide, titles + sum(line[0].shape[0] + _GAP for line in lines) + legend), "white")
    draw = ImageDraw.Draw(sheet)
    top = titles
    for number, line in enumerate(lines):
        left = _GAP
        heads = ("image", "label", "prediction") if len(line) == 3 else ("image", "prediction")
        for head, part in zip(heads, line, strict=True):
            if number == 0:
                draw.text((left, 2), head, "black", font=font)
            sheet.paste(Image.fromarray(part), (left, top))
            left += part.shape[1] + _GAP
        top += line[0].shape[0] + _GAP
    for place, number in enumerate(shown):
        left, high = _GAP + place % columns * 170, top + place // columns * 20
        draw.rectangle((left, high + 2, left + 14, high + 16), tuple(palette(count)[number].tolist()))
        draw.text((left + 20, high), names[number][:20], "black", font=font)
    return sheet
