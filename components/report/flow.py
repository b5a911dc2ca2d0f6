"""The flow picture: one row per step, a rail that shows what runs beside what, and a bar for when and how long."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from nvila.components.runner.status import AT_EXIT, Run, Status, StepStatus

ROW_PIXELS = 34
LANE_PIXELS = 18
DAG: tuple[tuple[str, int, tuple[str, ...], str], ...] = (
    ("resolve", 0, (), "recipe to slices"),
    ("preflight", 0, ("resolve",), "is everything there?"),
    ("validate", 0, ("preflight",), "data checked, spoilt records out"),
    ("base", 0, ("validate",), "first weights"),
    ("prune-image", 1, ("base",), "DeltaLoss, image sources"),
    ("prune-video", 2, ("base",), "DeltaLoss, video sources"),
    ("train-1", 0, ("base",), "projector initialisation"),
    ("train-2", 0, ("train-1",), "vision-encoder pre-training"),
    ("train-3", 0, ("train-2",), "token-processor pre-training"),
    ("train-4", 0, ("train-3", "prune-image"), "image instruction tuning"),
    ("train-5", 0, ("train-4", "prune-video"), "video instruction tuning"),
    ("evaluate", 0, ("train-5",), "held-out accuracy"),
    ("gate", 0, ("evaluate",), "good enough?"),
    ("quantize", 0, ("gate",), "W8A8 tower, W4A16 language model"),
    ("evaluate-quantized", 0, ("quantize",), "accuracy once more"),
    ("gate-quantized", 0, ("evaluate-quantized",), "still good enough?"),
    ("register", 0, ("gate-quantized",), "version in the registry"),
    ("rollout", 0, ("register",), "serve, ask, promote"),
)
"""Name, lane of the rail, what it follows, what it does. A page of its own cannot import the pipeline."""


def unfinished(run: Run) -> list[str]:
    """Steps of the DAG that have not come through, in order."""
    return run.unfinished(name for name, *_ in DAG)


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
    names = [name for name, *_ in DAG]
    abouts = {name: about for name, _, _, about in DAG}
    names += [name for name in run.steps if name not in abouts and name != AT_EXIT]
    began, ended = run.span
    total = (ended - began) or 1.0
    found = []
    for name in names:
        step = run.step(name)
        left = 100 * ((step.started or began) - began) / total
        width = 100 * step.seconds / total
        time = "" if step.ended is None else duration(step.seconds)
        found.append(Row(name, abouts.get(name, ""), _word(step), time, round(left, 2), round(max(width, 0.4), 2)))
    return found


def rail(run: Run, count: int) -> str:
    """The graph left of the rows, as SVG: a dot per step coloured by its status, a line to each step it follows."""
    lanes = {name: lane for name, lane, _, _ in DAG}
    at = {name: index for index, (name, *_) in enumerate(DAG)}
    width, height = 3 * LANE_PIXELS + 4, count * ROW_PIXELS
    lines, dots = [], []
    for name, lane, parents, _ in DAG:
        x, y = _point(lane, at[name])
        for parent in parents:
            px, py = _point(lanes[parent], at[parent])
            half = ROW_PIXELS / 2
            if lane == lanes[parent]:
                path = f"M{px},{py}L{x},{y}"
            elif lane > lanes[parent]:  # a branch leaves right below its parent
                path = f"M{px},{py}C{px},{py + half} {x},{py} {x},{py + ROW_PIXELS}L{x},{y}"
            else:  # a branch comes back right above its child
                path = f"M{px},{py}L{px},{y - ROW_PIXELS}C{px},{y} {x},{y - half} {x},{y}"
            lines.append(f'<path class="edge" d="{path}"/>')
        dots.append(f'<circle class="node {css(_word(run.step(name)))}" cx="{x}" cy="{y}" r="6"/>')
    return (
        f'<svg class="rail" width="{width}" height="{height}" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f"{''.join(lines)}{''.join(dots)}</svg>"
    )


def _word(step: StepStatus) -> str:
    """The step's status in a run that is over: whoever waits has not been reached."""
    return "not reached" if step.status is Status.WAITING else step.status


def css(status: str) -> str:
    """CSS class of a status."""
    return escape(status.replace(" ", "-"))


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 07 s`, `2 h 05 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _point(lane: int, row: int) -> tuple[float, float]:
    return lane * LANE_PIXELS + 10, row * ROW_PIXELS + ROW_PIXELS / 2
