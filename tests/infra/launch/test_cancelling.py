"""What becomes of a job when its step is asked to stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import Preempted
from nvila.components.kube.cluster import Cluster
from nvila.components.kube.connect import Connection
from nvila.components.kube.requests import Patience
from nvila.components.runner.work import Work
from nvila.infra.launch.follow import cancelled_with_us
from nvila.infra.launch.job import Job
from nvila.infra.launch.jobs import Jobs
from nvila.infra.launch.trainjob import KEY_LABEL, RUN_LABEL

WORK = Work("train-1", "m", "a" * 64, {}, {}, Path("/store/train-1/aaaa"), Path("/runs/r1"), Environment())


class OneJob:
    """Stands for a namespace in which there is a job for the work above."""

    def __init__(self, run: str) -> None:
        self.job = Job.of({"metadata": {"name": "j", "labels": {KEY_LABEL: "a" * 63, RUN_LABEL: run}}})
        self.deleted = False

    def moved(self, here: Environment) -> bool:
        return False

    def get(self, name: str, patience: Patience) -> Job:
        return self.job

    def delete(self, job: Job, patience: Patience) -> bool:
        self.deleted = True
        return True


@pytest.mark.parametrize(("run", "deleted"), [("r1", True), ("r2", False)])
def test_a_job_is_cancelled_by_the_run_it_belongs_to(run: str, deleted: bool) -> None:
    """Another run with the same work has attached to it: stopping the first run must not take its nodes away."""
    jobs = OneJob(run)
    with pytest.raises(Preempted), cancelled_with_us(jobs, WORK):  # type: ignore[arg-type]
        raise Preempted("asked to stop")
    assert jobs.deleted == deleted


def test_a_request_to_stop_comes_through_what_is_only_for_show() -> None:
    """It comes as an error of ours in the middle of any request: taken for a failed one, the step goes on."""

    class Stopped:
        connection = Connection(None, "c", "team-a")

        def ask(self, *_: object, **__: object) -> None:
            raise Preempted("asked to stop")

    with pytest.raises(Preempted):
        Jobs(Cluster(Stopped())).pods("j")  # type: ignore[arg-type]
