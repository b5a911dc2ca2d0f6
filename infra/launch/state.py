"""What the fields of a job and its pods mean: finished or not, why it waits, why it failed. Talks to nobody."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.exits import Exit

COMPLETE, FAILED = "Complete", "Failed"
INDEX = "batch.kubernetes.io/job-completion-index"
"""Label and annotation of a pod: number of its node."""


def finished(job: Mapping[str, Any]) -> str | None:
    """`Complete` or `Failed`; None while the job may still do anything.

    Nothing else counts: a job that Kueue has resumed may never show that it runs.
    """
    ended = [c["type"] for c in items(job, "status", "conditions") if c["status"] == "True"]
    return next((kind for kind in (FAILED, COMPLETE) if kind in ended), None)


def condition(job: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The condition of this type where it holds, else empty."""
    return next((c for c in items(job, "status", "conditions") if c["type"] == kind and c["status"] == "True"), {})


def node_of(pod: Mapping[str, Any]) -> int:
    """Number of the node that the pod is."""
    metadata = pod["metadata"]
    found = metadata.get("labels", {}).get(INDEX) or metadata.get("annotations", {}).get(INDEX)
    return int(found or 0)


def first_pod(pods: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The newest pod of the first node, whose log tells of the whole job."""
    return next((pod for pod in reversed(pods) if node_of(pod) == 0), None)


def is_running(pods: Iterable[Mapping[str, Any]]) -> bool:
    """Whether any pod of the job has come as far as its program."""
    return any(pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed") for pod in pods)


def why_waiting(
    job: Mapping[str, Any],
    pods: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
    workload: Mapping[str, Any] | None,
) -> str:
    """One line for people: what a job that does not run yet waits for."""
    if held := condition(job, "Suspended"):
        return f"queued: {_quota(workload) or held.get('message') or held.get('reason')}"
    for pod in pods:
        name = pod["metadata"]["name"]
        for state in items(pod, "status", "containerStatuses"):
            if waiting := state.get("state", {}).get("waiting"):
                return f"{name}: {waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
        for known in items(pod, "status", "conditions"):
            if known["type"] == "PodScheduled" and known["status"] == "False":
                return f"{name}: {known.get('reason')}: {known.get('message', '')}".rstrip(": ")
    if warnings:
        return warnings[-1]
    return "its pods are starting" if pods else "it has no pods yet"


def failure(job: Mapping[str, Any], pods: Sequence[Mapping[str, Any]]) -> NvilaError:
    """Why a job failed that has left no verdict of its own: the first pod that ended badly knows most."""
    name, said = job["metadata"]["name"], condition(job, FAILED)
    ends = sorted(filter(None, map(_end, pods)), key=lambda end: str(end["at"]))
    message = said.get("message") or said.get("reason") or "no reason given"
    if not ends:
        return NvilaError(f"job {name} failed: {message}", do=f"`kubectl describe trainjob {name}` may tell more.")
    first = ends[0]
    what = f"job {name} failed: pod {first['pod']} ended with {first['why']}, exit code {first['code']} ({message})"
    error = NvilaError(what, do=_ADVICE.get(first["why"], "Run the pipeline again and it resumes."))
    if first["code"] in list(Exit) and first["code"] != Exit.DONE:
        error.exit_code = Exit(first["code"])  # type: ignore[misc]
    return error


_ADVICE = {
    "OOMKilled": "Give nodes more memory (chart: trainer.memory) or the stage a smaller micro_batch, and run again.",
    "Evicted": "The node ran short of disk or memory; run the pipeline again and it resumes.",
}


def _end(pod: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a pod ended that ended badly."""
    status = pod.get("status", {})
    for state in items(pod, "status", "containerStatuses"):
        ended = state.get("state", {}).get("terminated")
        if ended and ended["exitCode"] != 0:
            why = status.get("reason") or ended.get("reason") or "Error"
            return {
                "pod": pod["metadata"]["name"],
                "why": why,
                "code": ended["exitCode"],
                "at": str(ended.get("finishedAt")),
            }
    if status.get("phase") == "Failed":
        return {"pod": pod["metadata"]["name"], "why": status.get("reason") or "Failed", "code": 1, "at": ""}
    return None


def _quota(workload: Mapping[str, Any] | None) -> str | None:
    """Kueue's own words about a workload that it has not admitted."""
    for known in items(workload or {}, "status", "conditions"):
        if known["type"] == "QuotaReserved" and known["status"] != "True":
            return str(known.get("message") or known.get("reason"))
    return None


def items(job: Mapping[str, Any], *path: str) -> Iterator[dict[str, Any]]:
    """The list at this path of an object, empty where a part of the path is missing."""
    found: Any = job
    for name in path:
        found = (found or {}).get(name)
    yield from found or ()
