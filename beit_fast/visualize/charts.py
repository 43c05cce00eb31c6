"""Line charts as SVG text for a page: its style sheet gives the colours, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 34, 40
_MOST_POINTS = 500
_KINDS = 6

STYLE = """
.chart { width: 100%; height: auto; background: var(--panel); border-radius: 6px; }
.chart text { font: 11px system-ui, sans-serif; fill: var(--faint); }
.chart .title { font-size: 13px; font-weight: 600; fill: var(--ink); }
.chart .grid { stroke: var(--rule); stroke-width: 1; }
.chart polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.chart .dashed { stroke-dasharray: 5 4; }
""" + "".join(
    f".chart .s{n} {{ stroke: var(--s{n}); }} .chart .d{n} {{ fill: var(--s{n}); }} .key{n} {{ color: var(--s{n}); }}\n"
    for n in range(_KINDS)
)
LIGHT = ("#1f63b5", "#c2570c", "#16805a", "#8b3fb0", "#6b6b6b", "#a8324a")
DARK = ("#74b6f7", "#f2a15c", "#5fd0a0", "#d59af0", "#b4b4b4", "#f08a9c")


class Series(NamedTuple):
    """One line of a chart; points whose y is missing or not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    dashed: bool = False


def line_chart(
    title: str, series: Sequence[Series], x_label: str = "optimizer step", log_x: bool = False, log_y: bool = False
) -> str:
    """A figure with its legend, as HTML; "" where no series has a point. On logarithmic axes only what is above 0."""
    lines = []
    for each in series:
        points = [(x, y) for x, y in zip(each.x, each.y, strict=True) if y is not None and math.isfinite(y)]
        points = [(x, y) for x, y in points if (x > 0 or not log_x) and (y > 0 or not log_y)]
        if points:
            lines.append((each, points))
    if not lines:
        return ""
    across = _Axis([x for _, points in lines for x, _ in points], log_x, _LEFT, WIDTH - _RIGHT)
    up = _Axis([y for _, points in lines for _, y in points], log_y, HEIGHT - _BOTTOM, _TOP, margin=0.06)
    parts = [f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>']
    for value in up.ticks():
        y = up.place(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for value in across.ticks():
        x = across.place(value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">{_number(value)}</text>')
    parts.append(
        f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>'
    )
    keys = []
    for number, (each, points) in enumerate(lines):
        kind = number % _KINDS
        dashed = " dashed" if each.dashed or number >= _KINDS else ""
        thinned = points[:: max(1, len(points) // _MOST_POINTS)] + points[-1:]
        where = " ".join(f"{across.place(x):.1f},{up.place(y):.1f}" for x, y in thinned)
        last = f"{each.name}: {_number(points[-1][1])} at {_number(points[-1][0])}"
        parts.append(f'<polyline class="s{kind}{dashed}" points="{where}"><title>{escape(last)}</title></polyline>')
        if len(points) <= 40 and not each.dashed:
            parts += [
                f'<circle class="d{kind}" cx="{across.place(x):.1f}" cy="{up.place(y):.1f}" r="2.4">'
                f"<title>{escape(each.name)}: {y:.5g} at {_number(x)}</title></circle>"
                for x, y in points
            ]
        line = "┄" if dashed else "━"
        keys.append(f'<span><b class="key{kind}">{line}</b> {escape(each.name)} <i>{_number(points[-1][1])}</i></span>')
    svg = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return f"<figure>{svg}{''.join(parts)}</svg><figcaption>{' '.join(keys)}</figcaption></figure>"


class _Axis:
    """From values to pixels between `start` and `end`."""

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float, margin: float = 0.0) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = min(values), max(values)
        if log:
            low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
            high = high if high > low else 10 * low
        elif low == high == 0:
            high = 1.0
        elif low == high:
            low, high = low - abs(low) * 0.5, high + abs(high) * 0.5
        else:
            low, high = low - margin * (high - low), high + margin * (high - low)
        self.low, self.high = low, high

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About five round values."""
        if self.log:
            exponents = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            return [10.0**n for n in exponents]
        rough = (self.high - self.low) / 5
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    """Short: 1.5e-03, 0.12, 3.25, 1,200, 16k."""
    size = abs(value)
    if size >= 1e5:
        return f"{value / 1e6:.3g}M" if size >= 1e6 else f"{value / 1e3:.4g}k"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < size < 1e-4 else f"{value:.4g}"
