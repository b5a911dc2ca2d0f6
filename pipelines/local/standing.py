"""A run on this machine as its folder tells it, for whoever did not start it: steps, how it ended, logs."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from nvila.components.contracts.errors import ConfigError, Preempted
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.processes import OWNER, Process
from nvila.components.contracts.results.run import Ending
from nvila.components.report.ending import ending
from nvila.components.runner.status import Run
from nvila.pipelines.local.child import ARGUMENTS
from nvila.pipelines.show.standing import Standing, follow
from nvila.pipelines.show.summary import LOG, SUMMARY, Summary
from nvila.pipelines.show.watch import StepState, read_states

_TASK = re.compile(r"^.*Executing task (?:\x1b\[\d+m)?'([^']+)'.*$", re.MULTILINE)
"""What KFP writes before a step's own lines; here one step runs at a time."""


class LocalRun:
    """One run (a `show.standing.Source`)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def find(cls, name: str, runs: Path) -> LocalRun | None:
        """The run in the folder of that path, or of that name in `runs`; None where there is none."""
        for folder in (runs / name, Path(name)):
            if (folder / ARGUMENTS).is_file():
                return cls(folder.resolve())
        return None

    def look(self) -> Standing:
        """How it stands."""
        over = self._ending()  # first: what is read after it is as new
        run = Run.read(self._folder)
        rows = run.pipeline.rows
        if over is None:
            return Standing(run.name, str(self._folder), read_states(self._folder, rows))
        steps = [StepState(s.name, s.in_the_end, s.seconds, s.message or "") for s in map(run.step, rows)]
        return Standing(run.name, str(self._folder), steps, over)

    def wait(self, console: Console) -> Standing:
        """Show the steps until it has ended.

        Raises:
            Preempted: on Ctrl-C, which is not for the run.
        """
        try:
            return follow(self, console)
        except KeyboardInterrupt:
            raise Preempted("no longer watched; the run goes on", where=str(self._folder)) from None

    def log(self, step: str) -> str:
        """The step's part of the run's log, of its newest try.

        Raises:
            ConfigError: there is no such step, or it has not begun.
        """
        rows = Run.read(self._folder).pipeline.rows
        if step not in rows:
            raise ConfigError(
                "the pipeline has no such step", where="STEP", value=step, do=f"Name one of {', '.join(rows)}."
            )
        try:
            text = (self._folder / LOG).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", where=str(self._folder / LOG)) from None
        marks = list(_TASK.finditer(text))
        ends = [*(mark.start() for mark in marks[1:]), len(text)]
        parts = [text[mark.end() : end] for mark, end in zip(marks, ends, strict=False) if mark[1] == step]
        if not parts:
            raise ConfigError("the step has not begun", where=step)
        return parts[-1].lstrip("\n")

    def _ending(self) -> Ending | None:
        """What its summary says; without one it goes on, unless its process is gone: that was killed."""
        try:
            said = Summary.model_validate_json((self._folder / SUMMARY).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None if self._lives() else ending(Run.read(self._folder), "", None)
        outcomes = {Exit.DONE: "succeeded", Exit.REJECTED: "rejected", Exit.PREEMPTED: "stopped"}
        return Ending.model_validate(
            {
                "outcome": outcomes.get(said.exit_code, "failed"),
                "exit_code": said.exit_code,
                "step": said.failed_step,
                "message": said.message,
            }
        )

    def _lives(self) -> bool:
        """As far as can be told from here: of another machine's nothing can."""
        try:
            owner = Process.model_validate_json((self._folder / OWNER).read_bytes())
        except (OSError, ValidationError):
            return False
        return owner.alive is not False
