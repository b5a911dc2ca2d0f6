"""What jobs and pods say of themselves, put into words."""

from __future__ import annotations

from typing import Any

import pytest

from nvila.components.contracts.exits import Exit
from nvila.infra.launch.job import Job, Pod
from nvila.infra.launch.logs import first_pod
from nvila.infra.launch.state import failure, why_waiting


def job(*conditions: tuple[str, str, str]) -> Job:
    rows = [{"type": kind, "status": status, "reason": "R", "message": message} for kind, status, message in conditions]
    return Job.of({"metadata": {"name": "j"}, "status": {"conditions": rows} if rows else None})


def pod(name: str, phase: str = "Pending", *, index: int = 0, **status: Any) -> Pod:
    label = {"batch.kubernetes.io/job-completion-index": str(index)}
    return Pod.of({"metadata": {"name": name, "labels": label}, "status": {"phase": phase, **status}})


def ended(code: int, reason: str, at: str) -> dict[str, Any]:
    return {"containerStatuses": [{"state": {"terminated": {"exitCode": code, "reason": reason, "finishedAt": at}}}]}


def test_only_complete_and_failed_are_ends() -> None:
    """A job that Kueue resumes may never show that it runs, and is `Suspended` again and again."""
    assert job().ended is None
    assert job(("Suspended", "False", ""), ("Complete", "False", "")).ended is None
    assert job(("Suspended", "True", "")).ended is None
    assert job(("Suspended", "False", ""), ("Complete", "True", "")).ended == "Complete"
    assert job(("Failed", "True", "")).ended == "Failed"


def test_a_queue_speaks_for_itself() -> None:
    """`Suspended` alone sends people to look for an error."""
    held = job(("Suspended", "True", "TrainJob is suspended"))
    assert why_waiting(held, [], [], "needs 8 more GPUs") == "queued: needs 8 more GPUs"
    assert why_waiting(held, [], [], None) == "queued: TrainJob is suspended"


def test_pods_that_cannot_start_say_why() -> None:
    """Each of these looks like a slow start otherwise."""
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no node has a GPU"}
    assert why_waiting(job(), [pod("p", conditions=[unscheduled])], [], None) == "p: Unschedulable: no node has a GPU"
    image = {"state": {"waiting": {"reason": "ImagePullBackOff"}}}
    assert why_waiting(job(), [pod("p", containerStatuses=[image])], [], None) == "p: ImagePullBackOff"
    assert why_waiting(job(), [], ["old", "FailedCreate: quota exceeded"], None) == "FailedCreate: quota exceeded"
    assert [each.runs for each in (pod("p"), pod("q", "Running"))] == [False, True]


def test_the_first_pod_to_end_badly_is_the_one_to_blame() -> None:
    """The others end because it has, with errors about lost connections."""
    pods = [
        pod("lost", "Failed", index=1, **ended(1, "Error", "2026-01-01T00:00:09Z")),
        pod("full", "Failed", index=2, **ended(137, "OOMKilled", "2026-01-01T00:00:01Z")),
        pod("fine", "Succeeded"),
    ]
    error = failure(job(("Failed", "True", "jobset failed")), pods)
    assert "pod full ended with OOMKilled, exit code 137 (jobset failed)" in str(error)
    assert "memory" in str(error)
    assert error.exit_code == Exit.FAULT


@pytest.mark.parametrize("code", [Exit.USER, Exit.REJECTED, Exit.PREEMPTED])
def test_our_own_exit_codes_are_kept(code: Exit) -> None:
    """A wrong input whose verdict could not be written would be retried as a fault."""
    pods = [pod("p", "Failed", **ended(int(code), "Error", "t"))]
    assert failure(job(("Failed", "True", "")), pods).exit_code == code


def test_evicted_pods_and_vanished_pods_have_a_message_too() -> None:
    """Neither has a container that says anything."""
    assert "Evicted" in str(failure(job(), [pod("p", "Failed", reason="Evicted")]))
    assert "deadline" in str(failure(job(("Failed", "True", "deadline exceeded")), []))


def test_the_newest_pod_of_the_first_node_has_the_log() -> None:
    """A restarted job has pods of several attempts, oldest first."""
    pods = [pod("old"), pod("other", index=1), pod("new"), pod("another", index=1)]
    found = first_pod(pods)
    assert found and found.name == "new"
    assert first_pod([]) is None
