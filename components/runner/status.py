"""The folder of a run: what each step says of itself in `steps/<step>.json`, how far it is, and what it has made.

Steps write their records here. The terminal, the report, `summary.json` and the webhook read a run here and nowhere
else; what is missing or broken is shown as such.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.files import read_bytes, write_atomic
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.pipelines import PIPELINES, Pipeline, PipelineName
from nvila.components.contracts.progress import progress_file
from nvila.components.contracts.results.result import Result
from nvila.components.contracts.steps import REPORT
from nvila.components.contracts.text import say
from nvila.components.tracking.redact import redact_text

R = TypeVar("R", bound=Result)


_KILLED = "killed"
"""Folder of what killed a step that could not say it itself, by its process: another attempt has another one."""


class Status(StrEnum):
    """How far a step is, or how it ended."""

    WAITING = "waiting"
    """It has left no word: its turn has not come."""
    RUNNING = "running"
    DONE = "done"
    CACHED = "cached"
    """The store had the work already."""
    NOT_ASKED_FOR = "not asked for"
    """The recipe leaves the step out; it handed its input on."""
    REJECTED = "rejected"
    FAILED = "failed"
    PREEMPTED = "preempted"
    KILLED = "killed"
    """It was running when its run ended: killed outright, it left no word. No step can write this of itself."""

    @property
    def came_through(self) -> bool:
        """Whether the step has what those after it need."""
        return self in (Status.DONE, Status.CACHED, Status.NOT_ASKED_FOR)

    @property
    def ended_badly(self) -> bool:
        """Whether the step said why it ended without."""
        return self in (Status.REJECTED, Status.FAILED, Status.PREEMPTED)


class StepStatus(BaseModel):
    """One step of a run."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    name: str
    status: Status
    pipeline: PipelineName = "lifecycle"
    """Whose step it is."""
    started: float | None = None
    """Seconds since the epoch, as `ended`."""
    ended: float | None = None
    exit_code: Exit | None = None
    manifest: str | None = None
    """Path of the manifest, where the step came through."""
    message: str | None = None
    """Why it ended badly, without secrets."""
    error: dict[str, Any] | None = None
    """The same for programs (see `errors.to_record`)."""
    damaged: bool = False
    """It met damaged work, which the next attempt does again."""
    pid: int | None = None

    def killer(self, run_dir: Path) -> str | None:
        """What killed the step, where who started it has seen that (`note_killed`)."""
        try:
            return read_bytes(run_dir / _KILLED / f"{self.pid}.txt").decode(errors="replace")
        except OSError:
            return None

    @property
    def seconds(self) -> float:
        """Wall time in this run, so far where it is running; a cached step took only the look-up."""
        end = time.time() if self.status is Status.RUNNING else self.ended
        return max(end - self.started, 0.0) if self.started is not None and end is not None else 0.0

    @property
    def in_the_end(self) -> str:
        """The status in a run that is over: whoever waits has not been reached."""
        return "not reached" if self.status is Status.WAITING else self.status

    @classmethod
    def read(cls, run_dir: Path, step: str) -> StepStatus:
        """What the step says of itself; `waiting` where it has said nothing, `failed` where its file is damaged."""
        path = _place(run_dir, step)
        try:
            return cls.model_validate_json(read_bytes(path)).model_copy(update={"name": step})
        except FileNotFoundError:
            return cls(name=step, status=Status.WAITING)
        except (OSError, ValidationError):
            return cls(name=step, status=Status.FAILED, message=f"the status file is damaged: {path}")

    def write(self, run_dir: Path) -> None:
        """Say it."""
        write_atomic(_place(run_dir, self.name), self.model_dump_json(indent=1))


@dataclass(frozen=True)
class Run:
    """A run that is over, but for those of its steps that are said to be alive."""

    folder: Path
    steps: dict[str, StepStatus] = field(default_factory=dict)
    """Those that have begun, in that order."""
    manifests: dict[str, Manifest] = field(default_factory=dict)
    """Of those that came through."""

    @classmethod
    def read(cls, folder: Path, alive: Collection[str] = ()) -> Run:
        """Read the records and the manifests that they name; a manifest that cannot be read is said, and missing.

        Args:
            folder: of the run.
            alive: steps that may be running still, as the one that asks.
        """
        records = statuses(folder)
        steps = {
            record.name: record.model_copy(update={"status": Status.KILLED})
            if record.status is Status.RUNNING and record.name not in alive
            else record
            for record in records
        }
        named = {step.name: step.manifest for step in records if step.manifest}
        return cls(folder, steps, {name: made for name, path in named.items() if (made := _load(path))})

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def pipeline(self) -> Pipeline:
        """The table that it is a run of, as its steps say."""
        said: PipelineName = next((step.pipeline for step in self.steps.values()), "lifecycle")
        return PIPELINES[said]

    def step(self, name: str) -> StepStatus:
        """One step, begun or not."""
        return self.steps.get(name) or StepStatus(name=name, status=Status.WAITING)

    def results(self, kind: type[R]) -> dict[str, R]:
        """What the steps that came through have told of this kind, by step."""
        return {step: made.result for step, made in self.manifests.items() if isinstance(made.result, kind)}

    def result(self, kind: type[R]) -> R | None:
        """The same where one step tells of it; None where it did not come through."""
        return next(iter(self.results(kind).values()), None)

    def unfinished(self, names: Iterable[str]) -> list[str]:
        """Those of the named steps that have not come through."""
        return [name for name in names if not self.step(name).status.came_through]

    def file(self, step: str, name: str) -> Path | None:
        """Path of a file of the step's output, when it is there as the step wrote it."""
        manifest = self.manifests.get(step)
        if manifest is None or name not in manifest.files:
            return None
        try:
            return manifest.path(name)
        except NvilaError as error:
            say(redact_text(f"left out: {error}"))
            return None

    @property
    def trouble(self) -> StepStatus | None:
        """The step that ended the run early.

        Of several the first that had a reason of its own: one that was asked to stop may have been about to go on
        elsewhere. Not the one at exit, unless it is the only one.
        """
        bad = [step for step in self.steps.values() if step.status.ended_badly]
        order = [(step.name == REPORT, step.status is Status.PREEMPTED, step.ended or 0) for step in bad]
        return bad[order.index(min(order))] if bad else None

    @property
    def lost(self) -> StepStatus | None:
        """A step that was killed before it could say how it ended."""
        return next((step for step in self.steps.values() if step.status is Status.KILLED), None)

    @property
    def span(self) -> tuple[float, float]:
        """First start and last end, in seconds since the epoch."""
        starts = [step.started for step in self.steps.values() if step.started is not None]
        ends = [step.ended for step in self.steps.values() if step.ended is not None]
        return (min(starts), max([*ends, *starts])) if starts else (0.0, 0.0)


def note_killed(run_dir: Path, pid: int, words: str) -> None:
    """Say for a step's process what killed it."""
    write_atomic(run_dir / _KILLED / f"{pid}.txt", words)


def statuses(run_dir: Path) -> list[StepStatus]:
    """What every step that has begun says of itself, in that order."""
    names = [path.stem for path in (run_dir / "steps").glob("*.json")]
    return sorted((StepStatus.read(run_dir, name) for name in names), key=lambda step: step.started or 0)


def progress(run_dir: Path, step: str) -> str:
    """How far a step is that is running, as it says itself (see `contracts.progress`); empty where it does not."""
    try:
        said = json.loads(read_bytes(progress_file(run_dir, step)))
        of = f"/{said['total']}" if said["total"] is not None else ""
        return f"{said['what']} {said['done']}{of} {said['note']}".strip()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def _place(run_dir: Path, step: str) -> Path:
    return run_dir / "steps" / f"{step}.json"


def _load(path: str) -> Manifest | None:
    """None where it is damaged or gone, which must not keep the run from being told of."""
    try:
        return Manifest.load(path)
    except NvilaError as error:
        say(redact_text(str(error)))
        return None
