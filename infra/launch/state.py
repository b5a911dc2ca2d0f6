"""Puts into words why a job waits and why it failed. Talks to nobody."""

from __future__ import annotations

from collections.abc import Sequence

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.exits import Exit
from nvila.infra.launch.job import FAILED, SUSPENDED, Job, Pod


def why_waiting(job: Job, pods: Sequence[Pod], warnings: Sequence[str], queue: str | None) -> str:
    """One line for people: what a job that does not run yet waits for; `queue` is what Kueue says about it."""
    if SUSPENDED in job.holds:
        return f"queued: {queue or job.holds[SUSPENDED]}"
    for pod in pods:
        if pod.waits:
            return f"{pod.name}: {pod.waits}"
    if warnings:
        return warnings[-1]
    return "its pods are starting" if pods else "it has no pods yet"


def failure(job: Job, pods: Sequence[Pod]) -> NvilaError:
    """Why a job failed that has left no verdict of its own: the first pod that ended badly knows most."""
    message = job.holds.get(FAILED) or "no reason given"
    ends = [(pod.name, pod.end) for pod in pods if pod.end]
    if not ends:
        what = f"job {job.name} failed: {message}"
        return NvilaError(what, do=f"`kubectl describe trainjob {job.name}` may tell more.")
    pod, end = min(ends, key=lambda pair: pair[1].at)
    what = f"job {job.name} failed: pod {pod} ended with {end.why}, exit code {end.code} ({message})"
    error = NvilaError(what, do=_ADVICE.get(end.why, "Run the pipeline again and it resumes."))
    if end.code in list(Exit) and end.code != Exit.DONE:
        error.exit_code = Exit(end.code)  # type: ignore[misc]
    return error


_ADVICE = {
    "OOMKilled": "Give nodes more memory (chart: trainer.memory) or the stage a smaller micro_batch, and run again.",
    "Evicted": "The node ran short of disk or memory; run the pipeline again and it resumes.",
}


def stuck(job: Job, pods: Sequence[Pod], seconds: float) -> NvilaError:
    """Why a job that was deleted is still there, as far as can be seen."""
    nodes = ", ".join(pod.name for pod in pods)
    return NvilaError(
        f"the job was deleted {seconds:.0f} s ago and is still there",
        where=f"trainjob/{job.name}",
        value={"finalizers": list(job.finalizers), "pods": nodes or "none"},
        do="A pod whose node is lost goes with `kubectl delete pod --force`, once the machine is known to be off; a "
        "finalizer is taken off by its controller, which may be down. Then run again.",
    )
