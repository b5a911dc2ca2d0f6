"""What becomes of a job when its step is asked to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import Preempted
from nvila.components.runner.work import Work
from nvila.infra.launch.follow import cancelled_with_us
from nvila.infra.launch.trainjob import KEY_LABEL, RUN_LABEL

WORK = Work("train-1", "m", "a" * 64, {}, {}, Path("/store/train-1/aaaa"), Path("/runs/r1"), Environment())


class OneJob:
    """Stands for a cluster in which there is a job for the work above."""

    def __init__(self, run: str) -> None:
        self.job = {"metadata": {"name": "j", "uid": "u", "labels": {KEY_LABEL: "a" * 63, RUN_LABEL: run}}}
        self.deleted = False

    def get(self, name: str, within_seconds: float | None = None) -> dict[str, Any]:
        return self.job

    def delete(self, job: dict[str, Any], within_seconds: float | None = None) -> bool:
        self.deleted = True
        return True


@pytest.mark.parametrize(("run", "deleted"), [("r1", True), ("r2", False)])
def test_a_job_is_cancelled_by_the_run_it_belongs_to(run: str, deleted: bool) -> None:
    """Another run with the same work has attached to it: stopping the first run must not take its nodes away."""
    cluster = OneJob(run)
    with pytest.raises(Preempted), cancelled_with_us(cluster, WORK):  # type: ignore[arg-type]
        raise Preempted("asked to stop")
    assert cluster.deleted == deleted
