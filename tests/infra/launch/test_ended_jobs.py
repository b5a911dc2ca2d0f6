"""Jobs that are over: removed after a time, and waited for only so long where they do not go."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import NvilaError
from nvila.infra.launch import follow, launcher
from nvila.infra.launch.job import Job
from nvila.infra.launch.trainjob import RUN_LABEL, STEP_LABEL

NOW = datetime.now(UTC)


def job(name: str, run: str = "r2", ended: timedelta | None = None, deleting: bool = False) -> Job:
    metadata: dict[str, Any] = {"name": name, "uid": name, "labels": {RUN_LABEL: run, STEP_LABEL: "train-1"}}
    if deleting:
        metadata |= {"deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["trainer/finalizer"]}
    when = (NOW - (ended or timedelta())).strftime("%Y-%m-%dT%H:%M:%SZ")
    rows = [{"type": "Failed", "status": "True", "lastTransitionTime": when}] if ended else []
    return Job.of({"metadata": metadata, "status": {"conditions": rows}})


class Namespace:
    """Stands for the jobs of a namespace; what is deleted goes at once, what was before does not."""

    def __init__(self, *jobs: Job) -> None:
        self.jobs = {job.name: job for job in jobs}

    def find(self, labels: str) -> list[Job]:
        name, _, value = labels.partition("=")
        return [job for job in self.jobs.values() if not value or (name == RUN_LABEL and job.run == value)]

    def get(self, name: str) -> Job | None:
        return self.jobs.get(name)

    def delete(self, job: Job) -> bool:
        return bool(self.jobs.pop(job.name))

    def pods(self, name: str) -> list[Any]:
        return []

    def wait_for_change(self, job: Job, seconds: float) -> None:
        pass


def test_ended_jobs_go_after_days_whatever_run_they_were_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stayed for ever: an uninstall waits for each, and a namespace of a year holds thousands with their pods."""
    there = Namespace(
        job("old", ended=timedelta(days=4)),
        job("new", ended=timedelta(days=2)),
        job("works"),
        job("ours", "r1"),
        job("goes", ended=timedelta(days=4), deleting=True),
    )
    monkeypatch.setattr(launcher, "_jobs", lambda here: there)
    launcher.close("r1", Environment())
    assert set(there.jobs) == {"new", "works", "goes"}


def test_an_end_that_says_no_time_is_not_long_ago() -> None:
    """A job that somebody's tool has marked would be removed under its step."""
    marked = {"metadata": {"name": "j"}, "status": {"conditions": [{"type": "Failed", "status": "True"}]}}
    assert Job.of(marked).ended_for(NOW) == 0


@pytest.mark.parametrize("wait", [follow.follow, follow._wait_until_gone])
def test_a_job_that_does_not_go_ends_the_wait(monkeypatch: pytest.MonkeyPatch, wait: Any) -> None:
    """A step waited for ever for the pod of a node that had been switched off, and said nothing."""
    monkeypatch.setattr(follow, "DELETION_SECONDS", 0.0)
    with pytest.raises(NvilaError, match=r"still there.*trainer/finalizer.*--force"):
        wait(Namespace(job("j", deleting=True)), job("j", deleting=True))
