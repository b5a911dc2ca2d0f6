"""The Lease that makes one of several controllers act, and the others wait (`coordination.k8s.io`).

Clocks of machines differ, so the times in it are for people only: as in client-go, whoever wants it waits until it has
not changed for its duration by his own clock, and who has it counts from before he asked to renew it. Every write names
the version that was read, so of two that are as quick only one succeeds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from nvila.components.kube.cluster import Cluster, Kind, Object
from nvila.components.kube.errors import ApiError, Conflict, NotThere

LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")


class Lease:
    """One name, of which at most one holder at a time has the lease."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        holder: str,
        seconds: int = 15,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is asked yet.

        Args:
            cluster: whose patience is a good deal shorter than `seconds`.
            name: of the Lease.
            holder: who asks for it; another one each time a process starts where two may run at a time.
            seconds: how long it lasts without being renewed.
            clock: of this machine, which only goes on.
        """
        self._cluster, self._name, self._holder, self._seconds, self._clock = cluster, name, holder, seconds, clock
        self._until = -float("inf")
        self._record: Any = None
        self._changed = 0.0
        """When the record was first seen as it is."""

    @property
    def valid(self) -> bool:
        """Whether it is still ours, with nobody asked."""
        return self._clock() < self._until

    def held(self) -> bool:
        """Get it, or renew it; whether it is ours now, which holds as long as `valid`.

        Raises:
            ApiError: one of its kinds; what was ours before still is as long as `valid`.
        """
        began = self._clock()
        found = self._cluster.get(LEASE, self._name)
        try:
            if found is None:
                self._cluster.create(LEASE, {"metadata": {"name": self._name}, "spec": self._spec({})})
            elif self._may_take(found):
                self._write(found, self._spec(found.get("spec") or {}))
            else:
                self._until = -float("inf")
                return False
        except (Conflict, NotThere):  # somebody was quicker, or has changed it otherwise
            return self.valid
        self._until = began + self._seconds
        return True

    def release(self) -> None:
        """Let the next one have it at once, as far as the API server can be told."""
        if not self.valid:
            return
        self._until = -float("inf")
        with contextlib.suppress(ApiError):
            found = self._cluster.get(LEASE, self._name)
            if found and found["spec"].get("holderIdentity") == self._holder:
                self._write(found, {"holderIdentity": None, "renewTime": _now()})

    def _may_take(self, found: Object) -> bool:
        """Whether it is ours, nobody's, or has not been renewed for its time."""
        record = found.get("spec") or {}
        if record != self._record:
            self._record, self._changed = record, self._clock()
        held_by = record.get("holderIdentity")
        if not held_by or held_by == self._holder:
            return True
        return self._clock() >= self._changed + record.get("leaseDurationSeconds", self._seconds)

    def _write(self, found: Object, spec: Object) -> None:
        version = {"resourceVersion": found["metadata"]["resourceVersion"]}
        self._cluster.patch(LEASE, self._name, {"metadata": version, "spec": spec})

    def _spec(self, before: Object) -> Object:
        now = _now()
        spec = {"holderIdentity": self._holder, "leaseDurationSeconds": self._seconds, "renewTime": now}
        if before.get("holderIdentity") != self._holder:
            spec |= {"acquireTime": now, "leaseTransitions": before.get("leaseTransitions", -1) + 1}
        return spec


def _now() -> str:
    """In UTC, to the microsecond, as the API has it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
