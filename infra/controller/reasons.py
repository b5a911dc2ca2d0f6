"""What a serving pod is, and what keeps it from being ready, by name: read from what the API server says of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from nvila.components.contracts.exits import Exit
from nvila.components.contracts.modelrollout import CONTAINER, FETCH
from nvila.components.contracts.text import visible
from nvila.components.kube.cluster import Object
from nvila.components.tracking.redact import redact_text
from nvila.infra.controller.seen import Pod
from nvila.infra.launch.job import conditions, said

DAMAGED = Exit.REJECTED
"""With this the init container ends where the files are not those of the version."""
MOST_CHARACTERS = 400
"""Of a reason: the end of a longer one is shown, where a log has its error."""
_PULLING = {
    *("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"),
    *("RegistryUnavailable", "SignatureValidationFailed"),
}
_WAITING = {"ContainerCreating", "PodInitializing", "CrashLoopBackOff"}
"""What a container waits for without anything being wrong with its description."""
_LOST = {"Unknown", "ContainerStatusUnknown"}
"""Reasons of an end that nobody has seen: the node was away."""
_UNLIKE = re.compile(r"0/(\d+) nodes are available: (\d+) node\(s\) didn't match (?:Pod's )?node (?:affinity|selector)")
_VOLUME = re.compile(r"persistentvolumeclaim|volume node affinity|volume\(s\)|find available persistent volumes", re.I)


class Why(NamedTuple):
    """A reason."""

    name: str
    told: str = ""
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {told}" if (told := shown(self.told)) else self.name


def pod_of(found: Object) -> Pod:
    """The pod, as the API server gives it."""
    status = found.get("status") or {}
    endpoint, fetch = (_status(status, name) for name in (CONTAINER, FETCH))
    holding = {one["type"] for one in conditions(found) if one["status"] == "True"}
    lost = "DisruptionTarget" in holding or status.get("phase") == "Failed" or status.get("reason") == "NodeLost"
    ready = "Ready" in holding
    why = next(_ended(endpoint), None) if ready else next(_reasons(found, fetch, endpoint), None)
    return Pod(
        name=found["metadata"]["name"],
        address=status.get("podIP", ""),
        ready=ready,
        restarts=0 if lost else _restarts(endpoint),
        why=str(why) if why else "",
        fatal=why is not None and why.fatal,
    )


def unmade(deployment: Object) -> str:
    """What keeps the pods of a Deployment from being made."""
    for one in conditions(deployment):
        if one["type"] == "ReplicaFailure" and one["status"] == "True":
            over = "exceeded quota" in said(one)
            return str(Why("Quota" if over else str(one.get("reason") or "ReplicaFailure"), said(one)))
    return ""


def shown(text: str) -> str:
    """`text` on one line, without secrets: a log's last words come along with a pod's end."""
    text = " ".join(redact_text(text).split())
    return visible(text if len(text) <= MOST_CHARACTERS else f"...{text[-MOST_CHARACTERS:]}")


def _reasons(found: Object, fetch: Object, endpoint: Object) -> Iterator[Why]:
    """What keeps a pod from being ready, the first thing first."""
    status = found.get("status") or {}
    if status.get("phase") == "Failed":
        yield Why(status.get("reason") or "Failed", status.get("message") or "")
    for one in conditions(found):
        if one["type"] == "PodScheduled" and one["status"] == "False":
            yield _unplaced(found, one)
    yield from _described(fetch)
    for end in _ends(fetch):
        if end["exitCode"] != Exit.DONE:
            yield _fetching(end)
    if "running" in fetch.get("state", {}):
        yield Why("NotReady", "its weights are being fetched")
    yield from _described(endpoint)
    yield from _ended(endpoint)
    waits = endpoint.get("state", {}).get("waiting") or {}
    unready = (said(one) for one in conditions(found) if one["type"] == "Ready")
    yield Why("NotReady", waits.get("reason") or next(unready, ""))


def _unplaced(found: Object, condition: Object) -> Why:
    told, spec = said(condition), found["spec"]
    devices = {name for one in spec["containers"] for name in (one.get("resources") or {}).get("limits") or {}}
    devices = {name for name in devices if "/" in name}
    unlike = _UNLIKE.search(told)
    if any(f"Insufficient {name}" in told for name in devices) or (devices and unlike and unlike[1] == unlike[2]):
        return Why("NoGPU", told)
    if _VOLUME.search(told):
        return Why("Volume", told)
    return Why(str(condition.get("reason") or "Unschedulable"), told)


def _described(container: Object) -> Iterator[Why]:
    """What cannot be started as it is described."""
    waits = container.get("state", {}).get("waiting") or {}
    reason, told = waits.get("reason"), waits.get("message") or ""
    if reason in _PULLING:
        yield Why("ImagePull", f"{reason}: {told}")
    elif reason and reason not in _WAITING:
        yield Why(reason, told)


def _fetching(end: Object) -> Why:
    if end.get("reason") == "OOMKilled":
        return Why("OOMKilled", f"while its weights were fetched {_told(end)}")
    damaged = end["exitCode"] == DAMAGED
    return Why("Digest" if damaged else "Weights", _told(end), fatal=damaged)


def _ended(endpoint: Object) -> Iterator[Why]:
    """How it has ended the last time."""
    for end in _ends(endpoint):
        yield Why("OOMKilled" if end.get("reason") == "OOMKilled" else "CrashLoop", _told(end))


def _ends(container: Object) -> Iterator[Object]:
    """The last end of a container first."""
    states: Iterable[Any] = (container.get(name) or {} for name in ("state", "lastState"))
    yield from (state["terminated"] for state in states if "terminated" in state)


def _told(end: Object) -> str:
    return f"(exit code {end['exitCode']}) {end.get('message') or ''}"


def _restarts(endpoint: Object) -> int:
    unseen = ((endpoint.get("lastState") or {}).get("terminated") or {}).get("reason") in _LOST
    return max(0, int(endpoint.get("restartCount", 0)) - unseen)


def _status(status: Object, name: str) -> Object:
    """Of a container; empty before the kubelet has said anything of it."""
    known = (*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ()))
    return next((one for one in known if one["name"] == name), {})
