"""Line charts as SVG text for a page, whose style sheet gives the colours, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

WIDTH, HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, WIDTH - 22, 34, HEIGHT - 40  # of the plot, in pixels
_MOST_POINTS, _MOST_COLUMNS = 500, 60
_COLOURS = 6
_SMALLEST_SPAN = 0.05
"""Least span of a linear axis, as a share of its largest value: less than that is not a change worth a slope."""

Points = list[tuple[float, float]]


class Series(NamedTuple):
    """One line of a chart; points whose y is missing or not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    dashed: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str = "optimizer step",
    log_x: bool = False,
    log_y: bool = False,
    from_zero: bool = False,
) -> str:
    """Draw a figure with a legend and the values under the mouse.

    Args:
        title: above the plot.
        series: its lines.
        x_label: below the plot; the values under the mouse are headed by it.
        log_x, log_y: logarithmic axes, on which only what is above 0 is drawn.
        from_zero: the y axis begins at zero, for quantities whose ratios count.

    Returns:
        HTML; "" where no series has a point.
    """
    lines: list[tuple[Series, Points]] = []
    for each in series:
        points = [(x, y) for x, y in zip(each.x, each.y, strict=True) if y is not None and math.isfinite(y)]
        points = [(x, y) for x, y in points if (x > 0 or not log_x) and (y > 0 or not log_y)]
        if points:
            lines.append((each, points))
    if not lines:
        return ""
    heights = [y for _, points in lines for _, y in points] + [0.0] * (from_zero and not log_y)
    x_axis = _Axis([x for _, points in lines for x, _ in points], log_x, _LEFT, _RIGHT)
    y_axis = _Axis(heights, log_y, _BOTTOM, _TOP, (0.0 if from_zero else 0.06, 0.06), _SMALLEST_SPAN)
    parts = [f'<text class="title" x="{_LEFT}" y="18">{escape(title)}</text>']
    for value in y_axis.ticks():
        y = y_axis.pixel(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in x_axis.ticks():
        parts.append(
            f'<text x="{x_axis.pixel(value):.1f}" y="{_BOTTOM + 15}" text-anchor="middle">{number(value)}</text>'
        )
    middle = (_LEFT + _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_label)}</text>')
    keys = []
    for index, (each, points) in enumerate(lines):
        dashed = each.dashed or index >= _COLOURS
        thinned = points[:: max(1, len(points) // _MOST_POINTS)] + points[-1:]
        pixels = [f"{x_axis.pixel(x):.1f},{y_axis.pixel(y):.1f}" for x, y in thinned]
        kind = f"s{index % _COLOURS}{' dashed' if dashed else ''}"
        parts.append(f'<polyline class="{kind}" points="{" ".join(pixels)}"/>')
        if len(points) <= 40 and not each.dashed:
            parts += [_dot(index, x_axis.pixel(x), y_axis.pixel(y)) for x, y in points]
        key = f'<b class="key{index % _COLOURS}">{"┄" if dashed else "━"}</b>'
        keys.append(f"<span>{key} {escape(each.name)} <i>{number(points[-1][1])}</i></span>")
    parts += _values(lines, x_axis, y_axis, x_label)
    svg = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return f"<figure>{svg}{''.join(parts)}</svg><figcaption>{' '.join(keys)}</figcaption></figure>"


def _dot(index: int, x: float, y: float) -> str:
    return f'<circle class="d{index % _COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>'


def _values(lines: Sequence[tuple[Series, Points]], x_axis: _Axis, y_axis: _Axis, x_label: str) -> list[str]:
    """Columns of the plot that show, while the mouse is over one, the values at its x."""
    columns = sorted({x for _, points in lines for x, _ in points[:: -(-len(points) // _MOST_COLUMNS)] + points[-1:]})
    centres = [x_axis.pixel(x) for x in columns]
    edges = [_LEFT, *((a + b) / 2 for a, b in pairwise(centres)), _RIGHT]
    heights = [dict(points) for _, points in lines]
    parts = []
    for x, centre, (left, right) in zip(columns, centres, pairwise(edges), strict=True):
        here = [(index, each[x]) for index, each in enumerate(heights) if x in each]
        words = [f"{x_label} {x:,.6g}", *(f"{lines[index][0].name}: {y:,.5g}" for index, y in here)]
        width = 6.2 * max(len(word) for word in words) + 10
        start = centre + 8 if centre < (_LEFT + _RIGHT) / 2 else centre - 8 - width
        parts += [
            f'<g class="at"><rect class="hit" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" '
            f'height="{_BOTTOM - _TOP}"/><g class="values">',
            f'<line x1="{centre:.1f}" x2="{centre:.1f}" y1="{_TOP}" y2="{_BOTTOM}"/>',
            *(_dot(index, centre, y_axis.pixel(y)) for index, y in here),
            f'<rect x="{start:.1f}" y="{_TOP}" width="{width:.0f}" height="{15 * len(words) + 6}" rx="4"/>',
            *(f'<text x="{start + 5:.1f}" y="{_TOP + 15 * (n + 1)}">{escape(w)}</text>' for n, w in enumerate(words)),
            "</g></g>",
        ]
    return parts


class _Axis:
    """From values to pixels between `start` and `end`."""

    def __init__(
        self,
        values: Sequence[float],
        log: bool,
        start: float,
        end: float,
        margins: tuple[float, float] = (0.0, 0.0),
        span: float = 0.0,
    ) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = min(values), max(values)
        if log:
            low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high))
            high = high if high > low else 10 * low
        elif low == high:
            low, high = low - abs(low) * 0.5, high + (abs(high) * 0.5 or 1.0)
        else:
            missing = max(0.0, span * max(abs(low), abs(high)) - (high - low)) / 2
            range_ = high - low
            low, high = low - missing - margins[0] * range_, high + missing + margins[1] * range_
        self.low, self.high = low, high

    def pixel(self, value: float) -> float:
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


def number(value: float) -> str:
    """Write a number shortly: 1.5e-03, 0.12, 3.25, 1,200, 160k."""
    size = abs(value)
    if size >= 1e5:
        return f"{value / 1e6:.3g}M" if size >= 1e6 else f"{value / 1e3:.4g}k"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1e}" if 0 < size < 1e-4 else f"{value:.4g}"
