"""Makes sure that there is exactly one job for a piece of work, waits until it has ended, and cancels it when asked."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from nvila.components.contracts.errors import Cancelled, ConfigError, NvilaError, Preempted
from nvila.components.contracts.progress import waiting_for
from nvila.components.contracts.site import Site
from nvila.components.contracts.step import Outcome
from nvila.components.kube.requests import Patience
from nvila.components.kube.stopping import undisturbed
from nvila.components.runner.handover import folder_of, hand_over, read_outcome
from nvila.components.runner.work import Work
from nvila.components.tracking.redact import tell
from nvila.infra.launch.job import COMPLETE, FAILED, Job
from nvila.infra.launch.jobs import Jobs
from nvila.infra.launch.state import stuck, why_waiting
from nvila.infra.launch.trainjob import ATTEMPT, job_name, label, train_job

LOOK_SECONDS = 15.0
"""A job is looked at when it changes, and at least this often: its pods change without it."""
DELETION_SECONDS = 1800.0
"""How long a job that was deleted may take to go. Its pods have 300 s to end; one of a lost node does not."""
CANCEL_SECONDS = 20.0
"""A pod that is asked to stop has 30 s to do so."""
T = TypeVar("T")


def say(work: Work, text: str) -> None:
    """A line in the step's log."""
    print(tell(f"{work.step}: {text}"), file=sys.stderr, flush=True)


def obtain(jobs: Jobs, work: Work, site: Site, outcome_seconds: float) -> Job:
    """The one job for this work: the one that is there, else a new one.

    A job that runs is attached to, whoever made it. One that has failed is this run's answer; for a new run it is
    deleted and made anew. One that is complete but has nothing to show (its folder was removed) is made anew as well.

    Raises:
        ConfigError: a job of this name belongs to other work, or the cluster refuses the job.
        PreflightError: no right to make jobs, or no Kubeflow Trainer.
        NvilaError: an earlier job, which was deleted, does not go.
    """
    name, key, run = job_name(work), label(work.key), label(work.run_dir.name)
    while True:
        job = jobs.get(name)
        if job is None:
            attempt = uuid.uuid4().hex[:12]
            body = train_job(work, attempt, hand_over(work, attempt), site)
            if job := jobs.create(body):
                say(work, f"job {name}: created in namespace {jobs.namespace}, {_size(body)}")
                return job
            continue  # another launcher, or a lost answer to this one: look who has it
        if job.key != key:
            raise ConfigError(
                "a job of this name does other work",
                where=f"trainjob/{name}",
                value=job.key,
                do=f"Look at it, then `kubectl delete trainjob {name}`, and run again.",
            )
        if job.deleting:
            say(work, f"job {name}: an earlier one is being deleted; waiting until its pods have gone")
            _wait_until_gone(jobs, job)
        elif job.ended is None and job.run != run:
            jobs.take_over(name, run)  # and look again: its run may just have cancelled it
        elif job.ended is None:
            say(work, f"job {name}: attached to the one that is there")
            return job
        elif job.ended == COMPLETE and outcome_of(work, job, outcome_seconds) is not None:
            say(work, f"job {name}: has been completed")
            return job
        elif job.ended == FAILED and job.run == run:
            return job
        else:
            why = "it has left nothing" if job.ended == COMPLETE else f"it failed in run {job.run}"
            say(work, f"job {name}: {why}; deleting it and beginning anew")
            jobs.delete(job)


def follow(jobs: Jobs, job: Job) -> Job:
    """The job when it is complete or has failed.

    Every round begins by asking how things stand, so that nothing depends on having seen each change.

    Raises:
        Cancelled: somebody has deleted the job.
        NvilaError: somebody has, and it does not go.
    """
    shown = ""
    while True:
        current = jobs.get(job.name)
        if current is None or current.uid != job.uid:
            raise Cancelled(
                "the job was deleted while it was at work",
                where=f"trainjob/{job.name}",
                do="Its checkpoints are kept: run the pipeline again and it resumes.",
            )
        if current.ended:
            return current
        text = _progress(jobs, current)
        if text and text != shown:
            waiting_for(f"job {job.name}: {text}")
            shown = text
        if current.deleting:
            _wait_until_gone(jobs, current)
        else:
            jobs.wait_for_change(current, LOOK_SECONDS)


def outcome_of(work: Work, job: Job, seconds: float) -> Outcome | None:
    """What the job has made, or None where it has left nothing in that time."""
    return in_time(partial(read_outcome, answers(work, job), work.step), seconds)


def in_time(read: Callable[[], T | None], seconds: float) -> T | None:
    """What `read` finds, at the latest after `seconds`: on a shared volume a file may show late."""
    deadline = time.monotonic() + seconds
    while (found := read()) is None and time.monotonic() < deadline:
        time.sleep(min(1.0, seconds))
    return found


def answers(work: Work, job: Job) -> Path:
    """The folder in which the job leaves its outcome or its verdicts.

    Raises:
        NvilaError: the job does not say on which attempt it works.
    """
    if not job.attempt:
        raise NvilaError(f"the job has no annotation {ATTEMPT}", where=f"trainjob/{job.name}")
    return folder_of(work.out, job.attempt)


@contextmanager
def cancelled_with_us(jobs: Jobs, work: Work) -> Iterator[None]:
    """When this step is asked to stop, its job is deleted: nobody else would end it.

    Not when this pod is only being moved (its node is drained, say): a successor attaches to the job, or else the exit
    task cancels it. And not when another run has attached meanwhile, to which the job belongs since.
    """
    try:
        yield
    except (Preempted, KeyboardInterrupt):
        with undisturbed():
            if jobs.moved(work.here):
                say(work, f"job {job_name(work)}: goes on; this pod is being moved")
                raise
            _cancel(jobs, work)
        raise


def _cancel(jobs: Jobs, work: Work) -> None:
    name, ours = job_name(work), (label(work.key), label(work.run_dir.name))
    patience = Patience.within(CANCEL_SECONDS / 2)
    try:
        while job := jobs.get(name, patience):
            if job.ended or (job.key, job.run) != ours:
                return
            if jobs.delete(job, patience):
                say(work, f"job {name}: cancelled, as this step was asked to stop")
                return
    except NvilaError as error:
        say(work, f"job {name}: NOT cancelled: {error}. Delete it by hand, or run again to go on with it.")


def _wait_until_gone(jobs: Jobs, job: Job) -> None:
    began = time.monotonic()
    while (current := jobs.get(job.name)) and current.uid == job.uid:
        if (waited := time.monotonic() - began) > DELETION_SECONDS:
            raise stuck(current, jobs.pods(job.name) or [], waited)
        jobs.wait_for_change(current, LOOK_SECONDS)


def _progress(jobs: Jobs, job: Job) -> str:
    """What there is to say about a job that has not ended; nothing once it runs, as then it speaks for itself."""
    if job.deleting:
        return "is being deleted; waiting until its pods have gone"
    pods = jobs.pods(job.name)
    if pods is None or any(pod.runs for pod in pods):
        return ""
    return why_waiting(job, pods, jobs.warnings(job.name), jobs.queue(job))


def _size(body: Mapping[str, Any]) -> str:
    trainer = body["spec"]["trainer"]
    return f"{trainer['numNodes']} node(s) with {trainer['numProcPerNode']} process(es)"
