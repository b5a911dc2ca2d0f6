"""The objects of one namespace: get, find, create, apply, patch, replace, delete with preconditions, watch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from nvila.components.kube.errors import Away, NotServed, NotThere
from nvila.components.kube.requests import APPLY, MERGE, Patience, Requests, read

Object = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of object, as an API server serves it."""

    version: str
    """With its group, such as `batch/v1`."""
    name: str
    plural: str
    namespaced: bool = True


NAMESPACE = Kind("v1", "Namespace", "namespaces", namespaced=False)
NODE = Kind("v1", "Node", "nodes", namespaced=False)
POD = Kind("v1", "Pod", "pods")
EVENT = Kind("v1", "Event", "events")
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
SECRET = Kind("v1", "Secret", "secrets")
VOLUME_CLAIM = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
QUOTA = Kind("v1", "ResourceQuota", "resourcequotas")


class Cluster:
    """One namespace of one cluster. Every method raises what `Requests.ask` does, except where it says otherwise."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self.name, self.namespace = requests.connection.name, requests.connection.namespace

    def get(self, kind: Kind, name: str, patience: Patience | None = None, *, namespace: str = "") -> Object | None:
        """The object, of another namespace where one is given; None where there is none of this name."""
        path = self.path(kind, name, namespace=namespace)
        try:
            return self._requests.ask("GET", path, patience=patience)
        except NotThere:
            return None

    def find(self, kind: Kind, *, labels: str = "", fields: str = "", patience: Patience | None = None) -> list[Object]:
        """The objects with these labels and fields (`name=value`, separated by commas)."""
        query = _selection(labels, fields)
        return list(self._requests.ask("GET", self.path(kind), query=query, patience=patience)["items"])

    def create(self, kind: Kind, body: Mapping[str, Any]) -> Object:
        """Make an object.

        An answer that got lost on the way is asked for again, so a Conflict may come of this very call.
        """
        return self._requests.ask("POST", self.path(kind), body=_typed(kind, body))

    def apply(self, kind: Kind, body: Mapping[str, Any], owner: str, part: str = "", *, force: bool = False) -> Object:
        """Make the object be as `body` says, or its `part` (`status`): server-side apply.

        Args:
            owner: whose fields they are; what this owner said before and says no more goes.
            force: take fields that belong to others, which is a Conflict else. So is a `resourceVersion` in `body`
                that is no longer the object's: by this, one of several holders gets a lease.
        """
        path = self.path(kind, body["metadata"]["name"], part)
        query = {"fieldManager": owner, "force": "true" if force else "false"}
        return self._requests.ask("PATCH", path, query=query, body=_typed(kind, body), form=APPLY)

    def patch(self, kind: Kind, name: str, change: Mapping[str, Any], part: str = "") -> Object:
        """Lay `change` over the object, or over its `part` (`status`)."""
        return self._requests.ask("PATCH", self.path(kind, name, part), body=change, form=MERGE)

    def replace(self, kind: Kind, body: Mapping[str, Any], part: str = "") -> Object:
        """Make the object, or its `part` (`status`), what `body` says and no more; a Conflict where its
        `resourceVersion` is no longer the object's.

        Where a custom resource is to lose a part with parts of its own, `apply` leaves nulls that its definition
        refuses (Kubernetes 1.20).
        """
        return self._requests.ask("PUT", self.path(kind, body["metadata"]["name"], part), body=_typed(kind, body))

    def delete(self, kind: Kind, name: str, uid: str, version: str, patience: Patience | None = None) -> None:
        """Delete the object if it still is this one (else a Conflict); it goes when what it owns has gone."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Foreground",
            "preconditions": {"uid": uid, "resourceVersion": version},
        }
        try:
            self._requests.ask("DELETE", self.path(kind, name), body=body, patience=patience)
        except NotThere:
            return

    def watch(
        self, kind: Kind, version: str, seconds: float, *, labels: str = "", fields: str = ""
    ) -> Generator[tuple[str, Object]]:
        """What happens (`ADDED`, `MODIFIED`, `DELETED`) and to which object, after this version.

        It only saves asking all the time: it ends after `seconds`, and without a word when it breaks or has expired.
        """
        query = _selection(labels, fields) | {
            "watch": "true",
            "resourceVersion": version,
            "timeoutSeconds": max(1, int(seconds)),
        }
        try:
            with self._requests.lines(self.path(kind), query, silence_seconds=seconds + 5) as lines:
                for line in lines:
                    event = read(line)
                    if event.get("type") not in ("ADDED", "MODIFIED", "DELETED"):
                        return
                    yield event["type"], event["object"]
        except (Away, ValueError):
            return

    def log(
        self, pod: str, container: str, since: str | None, silence_seconds: float
    ) -> AbstractContextManager[Iterator[bytes]]:
        """A context with the lines of a pod's log, each with its time in front, from `since` (whole seconds) on.

        Raises:
            Away: when it cannot be opened, or at the line at which it breaks off.
        """
        query: dict[str, Any] = {"container": container, "follow": "true", "timestamps": "true"}
        if since:
            query["sinceTime"] = since
        return self._requests.lines(self.path(POD, pod, "log"), query, silence_seconds)

    def served_version(self, group: str, plural: str) -> str | None:
        """The version of a group (with it) that serves this resource, the preferred one first; None without one."""
        try:
            offered = [entry["groupVersion"] for entry in self._requests.ask("GET", f"/apis/{group}")["versions"]]
            for version in offered:
                served = self._requests.ask("GET", f"/apis/{version}").get("resources", [])
                if any(resource["name"] == plural for resource in served):
                    return str(version)
        except (NotServed, NotThere):
            pass
        return None

    def path(self, kind: Kind, name: str = "", part: str = "", *, namespace: str = "") -> str:
        """Where the API server keeps the kind, one object of it, or a part of that object."""
        root = f"/apis/{kind.version}" if "/" in kind.version else f"/api/{kind.version}"
        within = f"namespaces/{namespace or self.namespace}" if kind.namespaced else ""
        return "/".join(filter(None, (root, within, kind.plural, name, part)))


def _typed(kind: Kind, body: Mapping[str, Any]) -> Object:
    return {"apiVersion": kind.version, "kind": kind.name, **body}


def _selection(labels: str, fields: str) -> dict[str, Any]:
    query = {"labelSelector": labels, "fieldSelector": fields}
    return {name: value for name, value in query.items() if value}
