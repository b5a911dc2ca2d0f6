"""The training jobs of a namespace: made, found, taken over and deleted, and what may be seen of their pods."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing
from typing import Any

from nvila.components.contracts.environment import Environment
from nvila.components.kube.cluster import EVENT, POD, Cluster, Kind, Object
from nvila.components.kube.errors import ApiError, Conflict, NotThere
from nvila.components.kube.requests import Advice, Patience
from nvila.components.kube.stopping import is_moved
from nvila.infra.launch.job import Job, Pod, conditions, said
from nvila.infra.launch.trainjob import API, RUN_LABEL

TRAIN_JOB = Kind(API, "TrainJob", "trainjobs")
JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
"""On the pods of a TrainJob: the JobSet made for it, which has its name."""
CONTAINER = "node"
"""In a training pod: Trainer wants it to be called so. Without it no log of a pod into which another was injected."""
ADVICE = Advice(
    right="Bind the Role nvila-launcher of the chart to the service account of the run's pods.",
    kind="Install Kubeflow Trainer 2, or set the chart's pipelines.launch=pods: steps then work in their own pods.",
)
_WORKLOADS = [Kind(f"kueue.x-k8s.io/{version}", "Workload", "workloads") for version in ("v1beta2", "v1beta1")]
"""Newest first; older Kueues have only the last."""
_ASIDE = Patience.once(5.0)
"""What is only shown to people is not waited for."""


class Jobs:
    """Those of one namespace."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.namespace = cluster.namespace

    def create(self, body: Mapping[str, Any]) -> Job | None:
        """Make a job; None where its name is taken, perhaps by this very call, whose answer got lost on the way."""
        try:
            return Job.of(self._cluster.create(TRAIN_JOB, body))
        except Conflict:
            return None

    def get(self, name: str, patience: Patience | None = None) -> Job | None:
        """The job, or None."""
        found = self._cluster.get(TRAIN_JOB, name, patience)
        return Job.of(found) if found else None

    def find(self, labels: str) -> list[Job]:
        """Jobs with these labels (`name=value`, separated by commas)."""
        return [Job.of(found) for found in self._cluster.find(TRAIN_JOB, labels=labels)]

    def take_over(self, name: str, run: str) -> None:
        """Let a job, which may have gone meanwhile, belong to this run."""
        try:
            self._cluster.patch(TRAIN_JOB, name, {"metadata": {"labels": {RUN_LABEL: run}}})
        except NotThere:
            return

    def delete(self, job: Job, patience: Patience | None = None) -> bool:
        """Delete the job if it still is as given; it goes when its pods have gone.

        Another run may take it over at any moment, so whoever gets False has to look again.
        """
        try:
            self._cluster.delete(TRAIN_JOB, job.name, job.uid, job.version, patience)
        except Conflict:
            return False
        return True

    def wait_for_change(self, job: Job, seconds: float) -> None:
        """Return when the job has changed, at the latest after `seconds`."""
        began = time.monotonic()
        with closing(
            self._cluster.watch(TRAIN_JOB, job.version, seconds, fields=f"metadata.name={job.name}")
        ) as changes:
            if next(changes, None) is None:  # a watch that breaks at once must not be asked for all the time
                time.sleep(max(0.0, 1.0 - (time.monotonic() - began)))

    def pods(self, job_name: str) -> list[Pod] | None:
        """The pods of a job, oldest first; None where they cannot be read just now."""
        found = self._aside(POD, labels=f"{JOBSET_LABEL}={job_name}")
        if found is None:
            return None
        return [Pod.of(pod) for pod in sorted(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))]

    def moved(self, here: Environment) -> bool:
        """Whether this process's pod is only being moved."""
        return is_moved(self._cluster, here)

    def warnings(self, prefix: str) -> list[str]:
        """What the cluster complains about objects whose name begins so, oldest first, as far as it can be read."""
        found = self._aside(EVENT, fields="type=Warning") or []
        events = [event for event in found if str(event["involvedObject"].get("name", "")).startswith(prefix)]
        events.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
        return [f"{event.get('reason')}: {event.get('message')}" for event in events]

    def queue(self, job: Job) -> str | None:
        """What Kueue says about a job that it has not admitted; None without Kueue, or the right to read it."""
        for kind in _WORKLOADS:
            if found := self._aside(kind, labels=f"kueue.x-k8s.io/job-uid={job.uid}"):
                held = (c for c in conditions(found[0]) if c["type"] == "QuotaReserved" and c["status"] != "True")
                return next(map(said, held), None)
        return None

    def log(self, pod: str, since: str | None, silence_seconds: float) -> AbstractContextManager[Iterator[bytes]]:
        """The log of a training pod, as `Cluster.log` gives it."""
        return self._cluster.log(pod, CONTAINER, since, silence_seconds)

    def _aside(self, kind: Kind, *, labels: str = "", fields: str = "") -> list[Object] | None:
        try:
            return self._cluster.find(kind, labels=labels, fields=fields, patience=_ASIDE)
        except ApiError:
            return None
