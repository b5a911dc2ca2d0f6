"""How a run stands, wherever it is: the same few words for `nvila status`, of this machine and of a cluster."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from rich.console import Console

from nvila.components.contracts.exits import Exit
from nvila.components.contracts.results.run import Ending
from nvila.components.tracking.redact import tell
from nvila.pipelines.show.watch import StepState, Watch, print_line, step_table

_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Standing:
    """A run as it is now."""

    run: str
    where: str
    """Its folder, or its page."""
    steps: list[StepState] = field(default_factory=list)
    ending: Ending | None = None
    """None while it goes on."""

    @property
    def exit_code(self) -> Exit:
        """That of a command that asks for it: going on is no fault."""
        return self.ending.exit_code if self.ending else Exit.DONE

    @property
    def line(self) -> str:
        """What became of it, in a line."""
        if self.ending is None:
            return f"running ({self.where})"
        words = [f"{self.ending.outcome} (exit code {int(self.ending.exit_code)})", self.ending.step]
        return f"{': '.join(filter(None, [*words, self.ending.message]))} ({self.where})"


class Source(Protocol):
    """A run that can be asked."""

    def look(self) -> Standing:
        """How it stands; may be asked twice a second."""

    def wait(self, console: Console) -> Standing:
        """Show the steps until it has ended.

        Raises:
            Preempted: somebody would not wait any longer.
        """

    def log(self, step: str) -> str:
        """What a step has printed.

        Raises:
            ConfigError: there is no such step, or no log of it.
        """


def follow(source: Source, console: Console) -> Standing:
    """Show the steps until the run has ended."""
    now = source.look()
    with Watch(now.run, lambda: now.steps, console) as watch:
        while now.ending is None:
            watch.refresh()
            time.sleep(_LOOK_SECONDS)
            now = source.look()
    return now


def show(now: Standing, console: Console) -> None:
    """For people."""
    print_line(console, tell(f"run {now.run}: {now.line}"))
    console.print(step_table(now.steps))


def as_json(now: Standing) -> dict[str, Any]:
    """For programs."""
    ended = now.ending
    return {
        "run": now.run,
        "where": now.where,
        "state": ended.outcome if ended else "running",
        "exit_code": int(ended.exit_code) if ended else None,
        "failed_step": ended.step if ended else None,
        "message": ended.message if ended else None,
        "steps": [asdict(step) for step in now.steps],
    }
