"""The tasks of a run as Kubeflow lists them, and the steps that they are."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.pipelines import Pipeline
from nvila.components.contracts.steps import ROWS
from nvila.pipelines.kubeflow.connection import plain
from nvila.pipelines.show.watch import StepState

if TYPE_CHECKING:
    from kfp_server_api import V2beta1PipelineTaskDetail, V2beta1Run

_NO_YEAR = 1970
_STATUS = {"SUCCEEDED": "done", "CANCELING": "cancelling", "CANCELED": "cancelled", "PENDING": "waiting"}
NO_REASON = "Kubeflow gives no reason"


def states(run: V2beta1Run, pipeline: Pipeline, now: datetime | None = None) -> list[StepState]:
    """Every step of the pipeline as the server tells it; of one that was tried again, the newest try."""
    found = newest(run)
    return [_state(name, found.get(name), now or datetime.now(UTC)) for name in pipeline.rows]


def newest(run: V2beta1Run) -> dict[str, V2beta1PipelineTaskDetail]:
    """The newest task of each step, by its name; what belongs to no step (drivers, executors) is left out."""
    tasks = [task for task in (run.run_details and run.run_details.task_details) or [] if task.display_name in ROWS]
    tasks.sort(key=lambda task: task.create_time or datetime.min.replace(tzinfo=UTC))
    return {task.display_name: task for task in tasks}


def failed(run: V2beta1Run) -> list[V2beta1PipelineTaskDetail]:
    """Tasks that failed, first things first; a try that was followed by another does not count."""
    found = [task for task in newest(run).values() if task.state == "FAILED"]
    return sorted(found, key=lambda task: task.end_time or datetime.max.replace(tzinfo=UTC))


def reason(task: V2beta1PipelineTaskDetail) -> str:
    """What the server says about a failure, in one line."""
    errors = [task.error, *(status.error for status in reversed(task.state_history or []))]
    return next((plain(e.message) for e in errors if e and e.message), NO_REASON)


def _state(name: str, task: Any, now: datetime) -> StepState:
    if task is None:
        return StepState(name, "waiting", 0.0, "")
    status = _STATUS.get(task.state, (task.state or "waiting").lower())
    return StepState(name, status, _seconds(task, now), reason(task) if status == "failed" else "")


def _seconds(task: V2beta1PipelineTaskDetail, now: datetime) -> float:
    """From start to end, or to now. Times that are not known yet come as the year 1 or 1970."""
    start, end = task.start_time, task.end_time
    if start is None or start.year <= _NO_YEAR:
        return 0.0
    return max(((now if end is None or end.year <= _NO_YEAR else end) - start).total_seconds(), 0.0)
