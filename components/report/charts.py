"""Charts as inline SVG: they follow the page's dark or light colours through CSS variables and need no script.

All are 360 units wide, so that their text is readable on a phone at its natural size. What to draw is left to `page`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

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
    """Points joined by a line, with a gap where a value is NaN."""

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
    low, high = y_range or _padded([y for _, y in every if not math.isnan(y)])
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
        faint = " faint" if line.faint else ""
        for known, part in groupby(line.points, lambda point: not math.isnan(point[1])):
            path = " ".join(f"{x(px):.1f},{y(min(max(py, low), high)):.1f}" for px, py in part)
            body += [f'<polyline class="s{line.series} line{faint}" points="{path}"/>'] if known else []
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


def losses(rows: Sequence[tuple[str, Sequence[Dot], bool]], title: str) -> str:
    """One line per row with all its dots, over 0 to the largest; rows that are `False` have their names in red."""
    shown = [dot.value for _, dots, _ in rows for dot in dots if math.isfinite(dot.value)]
    if not shown:
        return ""
    left, right, row = 8, 14, 36
    high = max(shown) or 1.0
    x = _scale(0, high, left, WIDTH - right)
    bottom = row * len(rows) + 4
    body = [f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="4" y2="{bottom}"/>' for t in _ticks(0, high)]
    for number, (name, dots, good) in enumerate(rows):
        y = row * number + 14
        body.append(f'<text class="group{"" if good else " doubt"}" x="0" y="{y}">{escape(_cut(name, 50))}</text>')
        body.append(f'<line class="guide" x1="{left}" x2="{WIDTH - right}" y1="{y + 12}" y2="{y + 12}"/>')
        body += [
            f'<circle class="s{dot.series} dot" cx="{x(max(dot.value, 0)):.1f}" cy="{y + 12}" r="4.5">'
            f"<title>{escape(f'{name}, {dot.label}: {dot.value:.3f}')}</title></circle>"
            for dot in dots
            if math.isfinite(dot.value)
        ]
    body += [
        f'<text class="tick" text-anchor="middle" x="{x(t):.1f}" y="{bottom + 14}">{t:g}</text>'
        for t in _ticks(0, high)
    ]
    return _svg(bottom + 20, title, body)


def paired_bars(rows: Sequence[tuple[str, float, float]], title: str) -> str:
    """Two thin bars per row, shares before and after, with both in percent behind them."""
    left, right, row = 112, 88, 21
    longest = max((share for _, *both in rows for share in both), default=0) or 1.0
    x = _scale(0, longest, left, WIDTH - right)
    body = []
    for number, (name, before, after) in enumerate(rows):
        y = row * number + 4
        body.append(
            f'<text class="small" x="0" y="{y + 11}"><title>{escape(name)}</title>{escape(_cut(name, 19))}</text>'
        )
        for series, share, top in ((7, before, y), (0, after, y + 7)):
            size = f'width="{max(x(share) - left, 0.5):.1f}" height="6"'
            body.append(f'<rect class="s{series} bar" x="{left}" y="{top}" {size}/>')
        text = f"{100 * before:.1f} → {100 * after:.1f}%"
        body.append(f'<text class="tick" text-anchor="end" x="{WIDTH}" y="{y + 11}">{text}</text>')
    return _svg(row * len(rows) + 4, title, body)


def histogram(low: float, high: float, kept: Sequence[int], dropped: Sequence[int], title: str) -> str:
    """What stayed stacked on what went, over as many bins of one width."""
    top_count = max(a + b for a, b in zip(dropped, kept, strict=True))
    height, left, right, top = 150, 14, 14, 8
    bottom = height - 24
    x, y = _scale(low, high, left, WIDTH - right), _scale(0, top_count, bottom, top)
    step = (high - low) / len(kept)
    body = []
    for index, (gone, stayed) in enumerate(zip(dropped, kept, strict=True)):
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


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
