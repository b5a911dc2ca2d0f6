"""The site of a cluster with Kubeflow Trainer: heavy steps become TrainJobs. Named by `NVILA_SITE`."""

from __future__ import annotations

from functools import partial

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.site import Site
from nvila.components.contracts.step import Outcome
from nvila.components.contracts.text import say
from nvila.components.runner.handover import read_verdict
from nvila.components.runner.work import Work
from nvila.infra.launch.cluster import Cluster
from nvila.infra.launch.follow import answers, cancelled_with_us, follow, in_time, obtain, outcome_of
from nvila.infra.launch.logs import LogCopy
from nvila.infra.launch.requests import Requests
from nvila.infra.launch.state import COMPLETE, failure, finished
from nvila.infra.launch.trainjob import RUN_LABEL, label

HEAVY = ("train-", "prune-")
"""Steps whose name begins so, and `evaluate`, become jobs."""
OUTCOME_SECONDS = 90.0
"""How long a network file system may hide a file that another machine has just written."""
VERDICT_SECONDS = 10.0
"""The same for a file that need not be there: a job whose pod was killed leaves none."""


def takes(work: Work) -> bool:
    """Whether the step becomes a job. Pruning without sources has nothing to do."""
    if work.step.startswith("prune-") and not work.settings.get("sources"):
        return False
    return work.step.startswith(HEAVY) or work.step == "evaluate"


def run(work: Work) -> Outcome:
    """Have the work done by a TrainJob and wait for it.

    Raises:
        NvilaError: what the job reported, with its exit code; or what became of it otherwise.
    """
    cluster = Cluster(Requests())
    with cancelled_with_us(cluster, work):
        job = obtain(cluster, work, work.here.site or Site(), OUTCOME_SECONDS)
        if finished(job) is None:
            with LogCopy(cluster, job["metadata"]["name"]):
                job = follow(cluster, job)
    name = job["metadata"]["name"]
    if finished(job) != COMPLETE:
        verdict = in_time(partial(read_verdict, answers(work, job)), VERDICT_SECONDS)
        raise verdict or failure(job, cluster.pods(name) or [])
    outcome = outcome_of(work, job, OUTCOME_SECONDS)
    if outcome is None:
        raise NvilaError(
            "the job is complete but has left no outcome",
            where=f"trainjob/{name}: {answers(work, job)}",
            do="The job's pods and this one must mount the same volume at the same place.",
        )
    return outcome


def close(run: str, here: Environment) -> None:
    """Cancel the jobs of a pipeline run that have not ended."""
    cluster, ours = Cluster(Requests()), f"{RUN_LABEL}={label(run)}"
    while going := [j for j in cluster.find(ours) if not finished(j) and not j["metadata"].get("deletionTimestamp")]:
        for job in going:
            if cluster.delete(job):
                say(f"job {job['metadata']['name']}: cancelled, as its run has ended")
