"""What the terminal shows while a run is going on: a live table, or plain lines where the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nvila.components.contracts.text import visible
from nvila.components.runner.status import Status, StepStatus, progress

PROGRESS_EVERY_SECONDS = 15.0
_COLOUR: dict[str, str] = {
    Status.RUNNING: "cyan",
    Status.DONE: "green",
    Status.CACHED: "blue",
    Status.REJECTED: "yellow",
    Status.FAILED: "red",
    Status.KILLED: "red",
    Status.PREEMPTED: "yellow",
}


@dataclass(frozen=True)
class StepState:
    """One row of the table: a step as its status and progress files tell it, or a cluster in its own words."""

    name: str
    status: str
    seconds: float
    note: str

    @classmethod
    def of(cls, step: StepStatus, note: str = "") -> StepState:
        """A step's own words."""
        return cls(step.name, step.status, step.seconds, step.message or note)


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print `text` as it is: rich reads no markup, no `:dog:` and no colours into it, and does not fold it."""
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def read_states(run_dir: Path, names: Iterable[str]) -> list[StepState]:
    """State of every one of these steps, in order; `waiting` where no status file is there yet."""
    return [StepState.of(StepStatus.read(run_dir, name), progress(run_dir, name)) for name in names]


class Watch:
    """Shows the states that `read` gives, again and again.

    Use it as a context manager and call `refresh` a few times a second.
    """

    def __init__(self, name: str, read: Callable[[], list[StepState]], console: Console) -> None:
        self._name, self._read, self._console = name, read, console
        self._began = time.time()
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._seen: dict[str, str] = {}
        self._spoke = time.monotonic()

    def __enter__(self) -> Watch:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.refresh()
        if self._live:
            self._live.stop()

    def refresh(self) -> None:
        """Read the states and show what is new."""
        states = self._read()
        if self._live:
            self._live.update(Group(Text(visible(self._title())), step_table(states)))
        else:
            self._lines(states)

    def _title(self) -> str:
        return f"{self._name}  {time.time() - self._began:.0f} s"

    def _lines(self, states: list[StepState]) -> None:
        for state in states:
            if state.status != self._seen.get(state.name, Status.WAITING):
                self._seen[state.name] = state.status
                took = "" if state.status in (Status.RUNNING, Status.WAITING) else f" in {state.seconds:.1f} s"
                self._say(f"{state.name}: {state.status}{took}")
        if time.monotonic() - self._spoke > PROGRESS_EVERY_SECONDS:
            running = [
                f"{s.name}: {s.note or 'running'} [{s.seconds:.0f} s]" for s in states if s.status == Status.RUNNING
            ]
            self._say("; ".join(running) or self._title())

    def _say(self, line: str) -> None:
        self._spoke = time.monotonic()
        print_line(self._console, f"[{time.time() - self._began:6.0f} s] {visible(line)}")


def step_table(states: list[StepState], notes: bool = True) -> Table:
    """Name, status and seconds of each step, whole at any width; and a remark, cut where the line ends."""
    table = Table(box=None, pad_edge=False, expand=notes)
    table.add_column("step", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("seconds", justify="right", no_wrap=True)
    if notes:
        table.add_column("", overflow="ellipsis", no_wrap=True, ratio=1)
    for state in states:
        colour = _COLOUR.get(state.status, "dim")
        seconds = f"{state.seconds:.1f}" if state.seconds else ""
        note = [Text(visible(state.note))] if notes else []
        table.add_row(visible(state.name), Text(visible(state.status), colour), seconds, *note)
    return table
