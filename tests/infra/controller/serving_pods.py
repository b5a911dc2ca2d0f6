"""A ModelRollout's spec, and pods as API servers give them, cut to what matters."""

from __future__ import annotations

from typing import Any

from nvila.components.contracts.modelrollout import MODEL_LABEL, VERSION_LABEL, Spec

Object = dict[str, Any]


def condition(kind: str, status: str = "True", reason: str = "", message: str = "") -> Object:
    return {"type": kind, "status": status} | {k: v for k, v in (("reason", reason), ("message", message)) if v}


def ended(code: int, reason: str = "Error", message: str = "") -> Object:
    found = {"exitCode": code, "reason": reason, "startedAt": "2026-11-28T01:00:00Z", "containerID": "containerd://1"}
    return {"terminated": found | ({"message": message} if message else {})}


def waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason} | ({"message": message} if message else {})}


RUNNING: Object = {"running": {"startedAt": "2026-11-28T01:00:00Z"}}
COMPLETED = ended(0, "Completed")
BACK_OFF = waiting("CrashLoopBackOff", "back-off 5m0s restarting failed container=endpoint pod=m-v2-6c9-x7")
PLAIN: Object = {"model": "m", "image": "i", "gateway": {"name": "g"}, "pods": {"gpus": 0}}


def spec(content: Object = PLAIN, **changes: Any) -> Spec:
    """What people decide, where it is this."""
    return Spec.model_validate({**content, **changes})


def container(name: str, state: Object, last: Object | None = None, restarts: int = 0) -> Object:
    return {"name": name, "state": state, "lastState": last or {}, "restartCount": restarts, "ready": state == RUNNING}


def pod(
    name: str = "m-v2-6c9-x7",
    *,
    weights: Object | None = None,
    endpoint: Object | None = None,
    conditions: tuple[Object, ...] = (),
    version: str = "2",
    rollout: str = "m",
    gpus: int = 1,
    deleted: bool = False,
    **status: Any,
) -> Object:
    """One of version 2 of the ModelRollout `m`."""
    limits = {"memory": "32Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    metadata: Object = {"name": name, "labels": {MODEL_LABEL: rollout, VERSION_LABEL: version}}
    return {
        "metadata": metadata | ({"deletionTimestamp": "2026-11-28T02:00:00Z"} if deleted else {}),
        "spec": {"containers": [{"name": "endpoint", "resources": {"limits": limits}}]},
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.7",
            "conditions": list(conditions),
            **({"initContainerStatuses": [weights]} if weights else {}),
            **({"containerStatuses": [endpoint]} if endpoint else {}),
            **status,
        },
    }


def ready(name: str = "m-v2-6c9-x7", **how: Any) -> Object:
    """One that serves."""
    given: Object = {
        "weights": container("weights", COMPLETED),
        "endpoint": container("endpoint", RUNNING),
        "conditions": (condition("PodScheduled"), condition("Ready")),
    }
    return pod(name, **(given | how))
