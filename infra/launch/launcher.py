"""The site of a cluster with Kubeflow Trainer: heavy steps become TrainJobs. Named by `NVILA_SITE`."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial

from nvila.components.contracts.environment import Environment, name_of
from nvila.components.contracts.errors import NvilaError, PreflightError
from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.contracts.site import Site
from nvila.components.contracts.step import Outcome
from nvila.components.contracts.steps import ROWS
from nvila.components.contracts.text import say
from nvila.components.kube.cluster import Cluster
from nvila.components.kube.connect import connect
from nvila.components.kube.errors import NoCluster
from nvila.components.kube.requests import Requests
from nvila.components.runner.handover import read_verdict
from nvila.components.runner.work import Work
from nvila.infra.launch.follow import answers, cancelled_with_us, follow, in_time, obtain, outcome_of
from nvila.infra.launch.job import COMPLETE
from nvila.infra.launch.jobs import ADVICE, Jobs
from nvila.infra.launch.logs import LogCopy
from nvila.infra.launch.state import failure
from nvila.infra.launch.trainjob import RUN_LABEL, STEP_LABEL, label

OUTCOME_SECONDS = 90.0
"""How long a network file system may hide a file that another machine has just written."""
VERDICT_SECONDS = 10.0
"""The same for a file that need not be there: a job whose pod was killed leaves none."""

ENDED_SECONDS = 3 * 86400.0
"""How long a job that has ended stays: over a weekend there are pods whose logs can be read, and a verdict for KFP's
Retry. A TrainJob has no such field of its own, and one of its JobSet would leave the TrainJob."""


def takes(work: Work) -> bool:
    """Whether the step becomes a job. Pruning without sources has nothing to do, and without a model little."""
    row = ROWS[work.step]
    if row.size != "gpus":
        return row.job
    return bool(work.settings["sources"]) and PruneSettings.model_validate(work.settings["prune"]).processes > 0


def run(work: Work) -> Outcome:
    """Have the work done by a TrainJob and wait for it.

    Raises:
        NvilaError: what the job reported, with its exit code; or what became of it otherwise.
    """
    jobs = _jobs(work.here)
    with cancelled_with_us(jobs, work):
        job = obtain(jobs, work, work.here.site or Site(), OUTCOME_SECONDS)
        if job.ended is None:
            with LogCopy(jobs, job.name):
                job = follow(jobs, job)
    if job.ended != COMPLETE:
        verdict = in_time(partial(read_verdict, answers(work, job)), VERDICT_SECONDS)
        raise verdict or failure(job, jobs.pods(job.name) or [])
    outcome = outcome_of(work, job, OUTCOME_SECONDS)
    if outcome is None:
        raise NvilaError(
            "the job is complete but has left no outcome",
            where=f"trainjob/{job.name}: {answers(work, job)}",
            do="The job's pods and this one must mount the same volume at the same place.",
        )
    return outcome


def close(run: str, here: Environment) -> None:
    """Cancel the jobs of a pipeline run that have not ended, and remove those of any run that ended long ago."""
    jobs, ours = _jobs(here), f"{RUN_LABEL}={label(run)}"
    while going := [job for job in jobs.find(ours) if not job.ended and not job.deleting]:
        for job in going:
            if jobs.delete(job):
                say(f"job {job.name}: cancelled, as its run has ended")
    now = datetime.now(UTC)
    for job in jobs.find(STEP_LABEL):
        if not job.deleting and job.ended_for(now) > ENDED_SECONDS and jobs.delete(job):
            say(f"job {job.name}: removed, {ENDED_SECONDS / 86400:.0f} days after it had ended")


def _jobs(here: Environment) -> Jobs:
    """Those of the namespace that `KUBECONFIG` names, or that this pod is in."""
    try:
        return Jobs(Cluster(Requests(connect(here.kubeconfig), advice=ADVICE)))
    except NoCluster as error:
        raise PreflightError(
            f"there is no cluster here that could take the job: {error}",
            where=name_of("site"),
            do=f"Set KUBECONFIG, or unset {name_of('site')}: steps then work in their own processes.",
        ) from None
