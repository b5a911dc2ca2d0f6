"""Charts as inline SVG: they follow the page's dark or light colours through CSS variables and need no script.

All are 360 units wide, so that their text is readable on a phone at its natural size. What to draw is left to `page`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360


@dataclass(frozen=True)
class Dot:
    """A value with its 95% interval, if it has one; `series` selects the colour class `s0`..`s7`."""

    series: int
    label: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """Points joined by a line."""

    series: int
    label: str
    points: Sequence[tuple[float, float]]
    faint: bool = False
    spread: Sequence[float] = ()
    """Of each point, how far its whisker reaches to either side."""


def dot_plot(groups: Sequence[tuple[str, Sequence[Dot]]], title: str) -> str:
    """Horizontal dot plot over 0..1, one block per group, one row per dot, whiskers for the intervals."""
    left, right, row, gap = 104, 14, 19, 26
    body: list[str] = []
    y = 8.0
    x = _scale(0, 1, left, WIDTH - right)
    for name, dots in groups:
        body.append(f'<text class="group" x="0" y="{y + 9:.1f}">{escape(name)}</text>')
        y += gap - 8
        for dot in dots:
            mid = y + row / 2
            body.append(f'<text class="small" x="8" y="{mid + 4:.1f}">{escape(dot.label)}</text>')
            body.append(f'<line class="guide" x1="{left}" x2="{WIDTH - right}" y1="{mid:.1f}" y2="{mid:.1f}"/>')
            if dot.low is not None and dot.high is not None:
                body.append(
                    f'<line class="s{dot.series} whisker" x1="{x(dot.low):.1f}" x2="{x(dot.high):.1f}" '
                    f'y1="{mid:.1f}" y2="{mid:.1f}"/>'
                )
            tip = f"{name}, {dot.label}: {dot.value:.3f}"
            body.append(
                f'<circle class="s{dot.series} dot" cx="{x(dot.value):.1f}" cy="{mid:.1f}" r="4.5">'
                f"<title>{escape(tip)}</title></circle>"
            )
            y += row
        y += 10
    axis = [f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="4" y2="{y - 4:.1f}"/>' for t in _quarters()]
    ticks = [
        f'<text class="tick" text-anchor="middle" x="{x(t):.1f}" y="{y + 10:.1f}">{t:g}</text>' for t in _quarters()
    ]
    return _svg(y + 16, title, [*axis, *body, *ticks])


def line_plot(
    lines: Sequence[Line],
    title: str,
    *,
    x_labels: Sequence[str] | None = None,
    y_range: tuple[float, float] | None = None,
    height: int = 190,
    marks: bool = False,
) -> str:
    """Lines over a common x axis; with `x_labels`, x counts 0, 1, ... and each has its label."""
    shown = [line for line in lines if line.points]
    if not shown:
        return ""
    every = [point for line in shown for point in line.points]
    low, high = y_range or _padded([y for _, y in every])
    x_low, x_high = min(p[0] for p in every), max(p[0] for p in every)
    left, right, top, bottom = 40, 24, 8, height - 24
    x, y = _scale(x_low, x_high, left, WIDTH - right), _scale(low, high, bottom, top)
    body = []
    for tick in _ticks(low, high):
        body.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        body.append(f'<text class="tick" text-anchor="end" x="{left - 5}" y="{y(tick) + 4:.1f}">{tick:g}</text>')
    labels = list(enumerate(x_labels)) if x_labels else [(t, f"{t:g}") for t in _ticks(x_low, x_high, 4)]
    for at, label in labels:
        body.append(f'<text class="tick" text-anchor="middle" x="{x(at):.1f}" y="{height - 8}">{escape(label)}</text>')
    for line in shown:
        path = " ".join(f"{x(px):.1f},{y(min(max(py, low), high)):.1f}" for px, py in line.points)
        faint = " faint" if line.faint else ""
        body.append(f'<polyline class="s{line.series} line{faint}" points="{path}"/>')
        for (px, py), reach in zip(line.points, line.spread, strict=False):
            ends = [y(min(max(py + sign * reach, low), high)) for sign in (-1, 1)]
            box = f'x1="{x(px):.1f}" x2="{x(px):.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"'
            body.append(f'<line class="s{line.series} whisker" {box}/>')
        if marks:
            body += [
                f'<circle class="s{line.series} dot" cx="{x(px):.1f}" cy="{y(py):.1f}" r="3.5">'
                f"<title>{escape(f'{line.label}: {py:.3f}')}</title></circle>"
                for px, py in line.points
            ]
    return _svg(height, title, body)


def histogram(kept: Sequence[float], dropped: Sequence[float], title: str, bins: int = 36) -> str:
    """What stayed stacked on what went, over common bins. Tails beyond 0.5% on either side share the end bins.

    Scores that are no number (a sample without a single answer token has none) have no place on the axis.
    """
    kept, dropped = ([value for value in some if math.isfinite(value)] for some in (kept, dropped))
    values = sorted([*kept, *dropped])
    if not values:
        return ""
    low, high = values[len(values) // 200], values[-1 - len(values) // 200]
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = [_binned(some, low, high, bins) for some in (dropped, kept)]
    top_count = max(a + b for a, b in zip(*counts, strict=True))
    height, left, right, top = 150, 14, 14, 8
    bottom = height - 24
    x, y = _scale(low, high, left, WIDTH - right), _scale(0, top_count, bottom, top)
    step = (high - low) / bins
    body = []
    for index, (gone, stayed) in enumerate(zip(*counts, strict=True)):
        at, width = x(low + index * step) + 0.5, x(step + low) - x(low) - 1
        for name, base, count in (("s7", 0, gone), ("s0", gone, stayed)):
            if count:
                top_y, tall = y(base + count), y(base) - y(base + count)
                box = f'x="{at:.1f}" y="{top_y:.1f}" width="{width:.1f}" height="{tall:.1f}"'
                body.append(f'<rect class="{name} bar" {box}/>')
    for tick in _ticks(low, high, 5):
        body.append(f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{height - 8}">{tick:g}</text>')
    if low <= 0 <= high:
        body.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{top}" y2="{bottom}"/>')
    body.append(f'<line class="axis" x1="{left}" x2="{WIDTH - right}" y1="{bottom}" y2="{bottom}"/>')
    return _svg(height, title, body)


def _svg(height: float, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {height:.0f}" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _quarters() -> tuple[float, ...]:
    return (0, 0.25, 0.5, 0.75, 1)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """Range of the values down to 0, without the highest 1% (the first steps of a loss curve)."""
    ordered = sorted(values)
    return min(0.0, ordered[0]), ordered[math.ceil(0.99 * (len(ordered) - 1))] or 1.0


def _ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers within the range."""
    rough = (high - low) / about or 1.0
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _binned(values: Sequence[float], low: float, high: float, bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[min(max(int((value - low) / (high - low) * bins), 0), bins - 1)] += 1
    return counts
