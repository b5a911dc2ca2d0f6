"""Reads what a run left behind: status files and the manifests they name. Missing or broken parts are shown as such."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.files import read_json
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.steps import NOT_ASKED_FOR, REPORT
from nvila.components.contracts.text import say

CAME_THROUGH = ("done", "cached", NOT_ASKED_FOR)
ENDED_BADLY = ("rejected", "failed", "preempted")


@dataclass(frozen=True)
class StepView:
    """One step of the run as its status file tells it."""

    name: str
    status: str
    """done, cached, not asked for, running, rejected, failed, preempted, or `not reached`."""
    started: float | None = None
    ended: float | None = None
    message: str = ""
    manifest: Manifest | None = None

    @property
    def seconds(self) -> float | None:
        """Wall time in this run; a cached step took only the look-up."""
        return None if self.started is None or self.ended is None else self.ended - self.started


@dataclass(frozen=True)
class RunView:
    """A whole run."""

    name: str
    steps: dict[str, StepView] = field(default_factory=dict)

    def values(self, step: str) -> dict[str, Any]:
        """The results of a step, empty when it has none."""
        manifest = self.manifest(step)
        return manifest.values if manifest else {}

    def manifest(self, step: str) -> Manifest | None:
        """The step's manifest, when it finished."""
        view = self.steps.get(step)
        return view.manifest if view else None

    def file(self, step: str, name: str) -> Path | None:
        """Path of a file of the step's output, when it is there as the step wrote it."""
        manifest = self.manifest(step)
        if manifest is None or name not in manifest.files:
            return None
        try:
            return manifest.path(name)
        except NvilaError as error:
            say(f"report: left out: {error}")
            return None

    @property
    def trouble(self) -> StepView | None:
        """The step that ended the run early.

        Of several the first that had a reason of its own: one that was asked to stop may have been about to go on
        elsewhere. Not `report`, which only tells of the others, unless it is the only one.
        """
        bad = [view for view in self.steps.values() if view.status in ENDED_BADLY]
        return min(bad, key=lambda v: (v.name == REPORT, v.status == "preempted", v.ended or 0)) if bad else None

    @property
    def lost(self) -> StepView | None:
        """A step that was killed before it could say how it ended."""
        return next((view for view in self.steps.values() if view.status == "running"), None)

    @property
    def span(self) -> tuple[float, float]:
        """First start and last end, in seconds since the epoch."""
        starts = [view.started for view in self.steps.values() if view.started is not None]
        ends = [view.ended for view in self.steps.values() if view.ended is not None]
        return (min(starts), max([*ends, *starts])) if starts else (0.0, 0.0)


def collect(run_dir: Path) -> RunView:
    """Everything `run_dir/steps/*.json` knows."""
    views = sorted(_views(run_dir / "steps"), key=lambda view: view.started or 0)
    return RunView(run_dir.name, {view.name: view for view in views})


def _views(folder: Path) -> Iterator[StepView]:
    for path in folder.glob("*.json"):
        record = read_json(path)
        if not record:
            yield StepView(path.stem, "failed", message="the status file is not JSON")
            continue
        message = record.get("message") or ""
        manifest = None
        if record.get("manifest"):
            try:
                manifest = Manifest.load(record["manifest"])
            except NvilaError as error:
                message = f"{message} {error}".strip()
        name = record.get("name", path.stem)
        yield StepView(name, record.get("status", "?"), record.get("started"), record.get("ended"), message, manifest)
