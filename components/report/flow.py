"""The flow picture: one row per step, a rail that shows what runs beside what, and a bar for when and how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from nvila.components.contracts.steps import Step, nearest
from nvila.components.contracts.text import duration
from nvila.components.runner.status import Run

ROW_PIXELS = 34
LANE_PIXELS = 18


def drawn(run: Run) -> tuple[Step, ...]:
    """The steps of its pipeline: not that which writes the page."""
    return tuple(row for row in run.pipeline.steps if not row.at_exit)


def unfinished(run: Run) -> list[str]:
    """Steps of the DAG that have not come through, in order."""
    return run.unfinished(row.name for row in drawn(run))


@dataclass(frozen=True)
class Row:
    """One line of the picture."""

    name: str
    about: str
    status: str
    time: str
    left: float
    """Start of the bar in percent of the run."""
    width: float

    @property
    def text_side(self) -> str:
        """Where there is more room beside the bar."""
        return "left" if self.left > 100 - self.left - self.width else "right"


def rows(run: Run) -> list[Row]:
    """Every step of the DAG in order, reached or not, then steps that this table does not know."""
    abouts = {row.name: row.remark for row in drawn(run)}
    names = [*abouts, *(name for name in run.steps if name not in run.pipeline.rows)]
    began, ended = run.span
    total = (ended - began) or 1.0
    found = []
    for name in names:
        step = run.step(name)
        left = 100 * ((step.started or began) - began) / total
        width = 100 * step.seconds / total
        time = "" if step.ended is None else duration(step.seconds)
        found.append(Row(name, abouts.get(name, ""), step.in_the_end, time, round(left, 2), round(max(width, 0.4), 2)))
    return found


def rail(run: Run, count: int) -> str:
    """The graph left of the rows, as SVG: a dot per step coloured by its status, a line to each step it follows."""
    before, places = nearest(drawn(run)), lanes(drawn(run))
    at = {name: index for index, name in enumerate(before)}
    width, height = (max(places.values()) + 1) * LANE_PIXELS + 4, count * ROW_PIXELS
    lines, dots = [], []
    for name, parents in before.items():
        lane = places[name]
        x, y = _point(lane, at[name])
        for parent in parents:
            px, py = _point(places[parent], at[parent])
            half = ROW_PIXELS / 2
            if lane == places[parent]:
                path = f"M{px},{py}L{x},{y}"
            elif lane > places[parent]:  # a branch leaves right below its parent
                path = f"M{px},{py}C{px},{py + half} {x},{py} {x},{py + ROW_PIXELS}L{x},{y}"
            else:  # a branch comes back right above its child
                path = f"M{px},{py}L{px},{y - ROW_PIXELS}C{px},{y} {x},{y - half} {x},{y}"
            lines.append(f'<path class="edge" d="{path}"/>')
        dots.append(f'<circle class="node {css(run.step(name).in_the_end)}" cx="{x}" cy="{y}" r="6"/>')
    return (
        f'<svg class="rail" width="{width}" height="{height}" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f"{''.join(lines)}{''.join(dots)}</svg>"
    )


def lanes(steps: Sequence[Step]) -> dict[str, int]:
    """Which lane of the rail each step has: the longest way through the graph has the first, branches lie beside it."""
    before = nearest(steps)
    names = list(before)
    way: dict[str, list[str]] = {}  # the longest that ends at each step
    for name in names:
        way[name] = [*max((way[parent] for parent in before[name]), key=len, default=[]), name]
    longest = max(way.values(), key=len)
    found = dict.fromkeys(longest, 0)
    taken: list[tuple[int, int, int]] = []  # lane, first and last row
    for row, name in enumerate(names):
        if name in found:
            continue
        first = min((names.index(parent) for parent in before[name]), default=row) + 1
        last = max((child for child, other in enumerate(names) if name in before[other]), default=row + 1) - 1
        crossed = {lane for lane, begins, ends in taken if begins <= last and first <= ends}
        found[name] = min(set(range(1, len(names) + 1)) - crossed)
        taken.append((found[name], first, last))
    return found


def css(status: str) -> str:
    """CSS class of a status."""
    return escape(status.replace(" ", "-"))


def _point(lane: int, row: int) -> tuple[float, float]:
    return lane * LANE_PIXELS + 10, row * ROW_PIXELS + ROW_PIXELS / 2
