"""One record of a TrainJob and one of a pod: what the API server says of them, read once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nvila.infra.launch.trainjob import ATTEMPT, KEY_LABEL, RUN_LABEL

COMPLETE, FAILED, SUSPENDED = "Complete", "Failed", "Suspended"
INDEX = "batch.kubernetes.io/job-completion-index"
"""Label and annotation of a pod: number of its node."""


@dataclass(frozen=True)
class Job:
    """A TrainJob at one moment."""

    name: str
    uid: str
    version: str
    """Changes with every change of the object."""
    key: str
    """Of the work, as far as a label holds it."""
    run: str
    """To which pipeline run the job belongs, as a label."""
    attempt: str
    """Which of the folders of the step's assignments it works on."""
    deleting: bool
    holds: Mapping[str, str]
    """By type, the conditions that hold, with their message or reason."""
    since: Mapping[str, str]
    """By type, when they began to hold, as the API server writes it."""
    finalizers: tuple[str, ...] = ()
    """Who has to let go of it before it is gone."""

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Job:
        """As the API server gives it."""
        metadata = found["metadata"]
        labels = metadata.get("labels", {})
        held = [c for c in conditions(found) if c["status"] == "True"]
        return cls(
            name=metadata["name"],
            uid=metadata.get("uid", ""),
            version=metadata.get("resourceVersion", ""),
            key=labels.get(KEY_LABEL, ""),
            run=labels.get(RUN_LABEL, ""),
            attempt=metadata.get("annotations", {}).get(ATTEMPT, ""),
            deleting="deletionTimestamp" in metadata,
            holds={c["type"]: said(c) for c in held},
            since={c["type"]: str(c.get("lastTransitionTime") or "") for c in held},
            finalizers=tuple(metadata.get("finalizers") or ()),
        )

    @property
    def ended(self) -> str | None:
        """`Complete` or `Failed`; None while the job may still do anything.

        Nothing else counts: a job that Kueue has resumed may never show that it runs.
        """
        return next((kind for kind in (FAILED, COMPLETE) if kind in self.holds), None)

    def ended_for(self, now: datetime) -> float:
        """Seconds since it ended; 0 where it has not, or does not say when."""
        try:
            then = datetime.fromisoformat(self.since[self.ended or ""])
        except (KeyError, ValueError):
            return 0.0
        return (now - (then if then.tzinfo else then.replace(tzinfo=UTC))).total_seconds()


@dataclass(frozen=True)
class End:
    """How a container ended that ended badly."""

    why: str
    code: int
    at: str


@dataclass(frozen=True)
class Pod:
    """A pod at one moment."""

    name: str
    uid: str
    node: int
    """Number of the node that it is."""
    runs: bool
    """Whether it has come as far as its program, or further."""
    has_log: bool
    waits: str
    """Why it does not run yet, where Kubernetes says so."""
    end: End | None

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Pod:
        """As the API server gives it."""
        metadata, status = found["metadata"], found.get("status") or {}
        index = metadata.get("labels", {}).get(INDEX) or metadata.get("annotations", {}).get(INDEX)
        states = [container.get("state", {}) for container in status.get("containerStatuses") or ()]
        return cls(
            name=metadata["name"],
            uid=metadata.get("uid", ""),
            node=int(index or 0),
            runs=status.get("phase") in ("Running", "Succeeded", "Failed"),
            has_log=any("running" in state or "terminated" in state for state in states),
            waits=next(_waits(found, states), ""),
            end=_end(status, states),
        )


def conditions(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of any object; it may have no status yet."""
    return (found.get("status") or {}).get("conditions") or []


def said(condition: Mapping[str, Any]) -> str:
    """What a condition tells people."""
    return str(condition.get("message") or condition.get("reason") or "")


def _waits(found: Mapping[str, Any], states: list[dict[str, Any]]) -> Iterator[str]:
    unplaced = [c for c in conditions(found) if c["type"] == "PodScheduled" and c["status"] == "False"]
    for reason in [*filter(None, (state.get("waiting") for state in states)), *unplaced]:
        yield f"{reason.get('reason')}: {reason.get('message', '')}".rstrip(": ")


def _end(status: Mapping[str, Any], states: list[dict[str, Any]]) -> End | None:
    for ended in filter(None, (state.get("terminated") for state in states)):
        if ended["exitCode"] != 0:
            why = status.get("reason") or ended.get("reason") or "Error"
            return End(why, ended["exitCode"], str(ended.get("finishedAt")))
    if status.get("phase") == FAILED:
        return End(status.get("reason") or FAILED, 1, "")
    return None
