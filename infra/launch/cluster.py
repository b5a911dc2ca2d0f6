"""What the launcher deals with in a namespace, as plain data: TrainJobs, their pods, logs and events."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from nvila.infra.launch.requests import Exists, NotThere, Requests, broken, read
from nvila.infra.launch.trainjob import API

JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
"""On the pods of a TrainJob: the JobSet made for it, which has its name."""
CONTAINER = "node"
"""In a training pod: Trainer wants it to be called so."""
_KUEUE = ("/apis/kueue.x-k8s.io/v1beta2", "/apis/kueue.x-k8s.io/v1beta1")
"""Newest first; older Kueues have only the last."""
_ASIDE_SECONDS = 5.0
"""What is only shown to people is not waited for."""


class Cluster:
    """One namespace of one cluster."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self.host, self.namespace = requests.host, requests.namespace
        self._jobs = f"/apis/{API}/namespaces/{self.namespace}/trainjobs"
        self._core = f"/api/v1/namespaces/{self.namespace}"

    def create(self, body: Mapping[str, Any]) -> dict[str, Any] | None:
        """Make a TrainJob; None where its name is taken.

        An answer that got lost on the way is asked for again, so the name may have been taken by this very call.
        """
        try:
            return self._requests.ask("POST", self._jobs, body=body)
        except Exists:
            return None

    def get(self, name: str, within_seconds: float | None = None) -> dict[str, Any] | None:
        """The TrainJob, or None."""
        try:
            return self._requests.ask("GET", f"{self._jobs}/{name}", within_seconds=within_seconds)
        except NotThere:
            return None

    def find(self, labels: str) -> list[dict[str, Any]]:
        """TrainJobs with these labels (`name=value`, separated by commas)."""
        return list(self._requests.ask("GET", self._jobs, query={"labelSelector": labels})["items"])

    def set_labels(self, name: str, labels: Mapping[str, str]) -> None:
        """Change some labels of a TrainJob that may have gone meanwhile."""
        try:
            self._requests.ask("PATCH", f"{self._jobs}/{name}", body={"metadata": {"labels": labels}})
        except NotThere:
            return

    def delete(self, job: Mapping[str, Any], within_seconds: float | None = None) -> bool:
        """Delete the TrainJob if it still is as given; it goes when its pods have gone.

        Another run may take it over at any moment, so whoever gets False has to look again.
        """
        metadata = job["metadata"]
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]},
        }
        try:
            self._requests.ask("DELETE", f"{self._jobs}/{metadata['name']}", body=body, within_seconds=within_seconds)
        except NotThere:
            return True
        except Exists:
            return False
        return True

    def wait_for_change(self, job: Mapping[str, Any], seconds: float) -> None:
        """Return when the TrainJob has changed, at the latest after `seconds`.

        Only saves asking all the time: a watch that breaks, ends early or has expired (410) just returns.
        """
        began = time.monotonic()
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={job['metadata']['name']}",
            "resourceVersion": job["metadata"]["resourceVersion"],
            "timeoutSeconds": max(1, int(seconds)),
        }
        try:
            with self._requests.lines(self._jobs, query, silence_seconds=seconds + 5) as lines:
                for line in lines:
                    if read(line).get("type") in ("ADDED", "MODIFIED", "DELETED"):
                        return
        except broken():
            pass
        time.sleep(max(0.0, 1.0 - (time.monotonic() - began)))

    def pods(self, job_name: str) -> list[dict[str, Any]] | None:
        """The pods of a TrainJob, oldest first; None where they cannot be read just now."""
        found = self._aside(f"{self._core}/pods", {"labelSelector": f"{JOBSET_LABEL}={job_name}"})
        return sorted(found["items"], key=lambda pod: str(pod["metadata"]["creationTimestamp"])) if found else None

    def pod(self, name: str) -> dict[str, Any] | None:
        """A single pod, or None where it cannot be read quickly."""
        return self._aside(f"{self._core}/pods/{name}")

    def warnings(self, prefix: str) -> list[str]:
        """What the cluster complains about objects whose name begins so, oldest first, as far as it can be read."""
        found = self._aside(f"{self._core}/events", {"fieldSelector": "type=Warning"}) or {"items": []}
        events = [e for e in found["items"] if str(e["involvedObject"].get("name", "")).startswith(prefix)]
        events.sort(key=lambda e: str(e.get("lastTimestamp") or e.get("eventTime") or ""))
        return [f"{e.get('reason')}: {e.get('message')}" for e in events]

    def workload(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """What Kueue keeps about a TrainJob; None without Kueue or without the right to read it."""
        query = {"labelSelector": f"kueue.x-k8s.io/job-uid={job['metadata']['uid']}"}
        for version in _KUEUE:
            if found := self._aside(f"{version}/namespaces/{self.namespace}/workloads", query):
                return next(iter(found["items"]), None)
        return None

    def log(self, pod: str, since: str | None, silence_seconds: float) -> Any:
        """A context with the lines of a pod's log, each with its time in front, from `since` (whole seconds) on."""
        # Without its name the API refuses a pod into which somebody injected a second container.
        query: dict[str, Any] = {"container": CONTAINER, "follow": "true", "timestamps": "true"}
        if since:
            query["sinceTime"] = since
        return self._requests.lines(f"{self._core}/pods/{pod}/log", query, silence_seconds)

    def _aside(self, path: str, query: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Asked once: what is only for show must not hold anything up."""
        try:
            with self._requests.lines(path, query or {}, _ASIDE_SECONDS) as lines:
                return read(b"\n".join(lines))
        except broken():
            return None
