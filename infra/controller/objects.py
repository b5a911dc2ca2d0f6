"""What serves a model, as plain data: per version a Deployment and a Service, and one HTTPRoute before them all.

Pure. Who applies them, and when, is the loop's. What the API server or people have made of an object is compared with
what it should be by `holds`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from nvila.components.contracts.modelrollout import (
    API,
    HTTP_PORT,
    KIND,
    MODEL_LABEL,
    PART_LABELS,
    PIN_HEADER,
    PLURAL,
    VERSION_LABEL,
    Spec,
)
from nvila.components.kube.cluster import Kind, Object
from nvila.infra.controller.pod import pod
from nvila.infra.controller.seen import Registered

MODEL_ROLLOUT = Kind(API, KIND, PLURAL)
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
SERVICE = Kind("v1", "Service", "services")
ROUTE = Kind("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes")

WANTED = "nvila.io/wanted"
"""Annotation: digest of what the controller wants. That it wants something no more is not to be seen otherwise."""
NOBODY = "none"
"""In place of a version's number: no pod has it."""
ROUTE_SECONDS = 10
"""Longer than the endpoint's own limit of a request, which says why it ends one."""
_LABEL = 63
"""Characters of a label's value, and of a Service's name."""
_PLAIN = re.compile(rf"[a-z]([-a-z0-9]{{0,{_LABEL - 2}}}[a-z0-9])?")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|[kMGTP]|[KMGTP]i|)")
_QUANTITIES = ("requests", "limits", "sizeLimit")


@dataclass(frozen=True)
class Owner:
    """The ModelRollout that an object belongs to, and goes with."""

    name: str
    namespace: str
    uid: str


@dataclass(frozen=True)
class Platform:
    """What all serving pods have of the platform."""

    fetch_image: str
    """Brings the weights: the controller's own image."""
    pull_policy: str = "IfNotPresent"
    """Of all images."""
    cache_claim: str = "nvila-cache"
    """PersistentVolumeClaim with the node's cache."""
    pull_secrets: tuple[str, ...] = ()
    """Names of Secrets."""


def name_of(owner: Owner, version: str) -> str:
    """Of a version's Deployment and Service."""
    return _fitted(owner.name, f"-v{version}")


def champion_name(owner: Owner) -> str:
    """Of the Service before the version that serves."""
    return _fitted(owner.name, "-champion")


def label_of(name: str) -> str:
    """A ModelRollout's name as the label `MODEL_LABEL` has it."""
    return name if len(name) <= _LABEL else _fitted(name, "")


def deployment(owner: Owner, spec: Spec, version: Registered, platform: Platform) -> Object:
    """The pods of a version that has a digest."""
    labels = _labels(owner, version.version)
    content = {
        "replicas": spec.pods.replicas,
        "selector": {"matchLabels": _selector(owner, version.version)},
        # The next pod is ready before one goes.
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "progressDeadlineSeconds": math.ceil(spec.policy.deadline_seconds),
        "revisionHistoryLimit": 1,
        "template": {
            "metadata": {"labels": labels},
            "spec": pod(spec, version, platform, f"{champion_name(owner)}.{owner.namespace}.svc:{HTTP_PORT}"),
        },
    }
    return _object(owner, DEPLOYMENT, name_of(owner, version.version), labels, content)


def service(owner: Owner, version: str) -> Object:
    """Before the pods of a version."""
    content = _before(owner, version)
    return _object(owner, SERVICE, name_of(owner, version), _labels(owner, version), content)


def champion_service(owner: Owner, version: str) -> Object:
    """Before the pods of the version that serves; of none while that is empty."""
    return _object(owner, SERVICE, champion_name(owner), _labels(owner), _before(owner, version or NOBODY))


def route(owner: Owner, spec: Spec, champion: str, challenger: str, weight: int) -> Object:
    """Who gets which requests.

    Args:
        owner: whose users.
        spec: with the Gateway and the host names.
        champion: the version that serves, or empty.
        challenger: the version that is tried, or empty.
        weight: per cent of the requests that the challenger gets; without any it cannot be asked by name either.
    """
    tried = challenger if weight else ""
    shares = {version: share for version, share in ((champion, 100 - weight), (tried, weight)) if version and share}
    backends = [_backend(name_of(owner, version), share) for version, share in shares.items()]
    rules: list[Object] = [
        {
            "matches": [{"headers": [{"type": "Exact", "name": PIN_HEADER, "value": version}]}],
            "backendRefs": [_backend(name_of(owner, version), 1)],
        }
        for version in filter(None, (champion, tried))
    ]
    rules.append({"backendRefs": backends or [_backend(champion_name(owner), 1)]})
    # Without this many a Gateway ends an answer after 15 seconds.
    timeouts = {"request": f"{math.ceil(spec.endpoint.request_seconds) + ROUTE_SECONDS}s"}
    gateway = spec.gateway
    parent = {"name": gateway.name, "namespace": gateway.namespace or owner.namespace}
    if gateway.section_name:
        parent["sectionName"] = gateway.section_name
    content: Object = {"parentRefs": [parent], "rules": [{**rule, "timeouts": timeouts} for rule in rules]}
    if spec.hostnames:
        content["hostnames"] = spec.hostnames
    return _object(owner, ROUTE, owner.name, _labels(owner), content)


def holds(observed: Any, wanted: Any, key: str = "") -> bool:
    """Whether `observed` says all that `wanted` says: lists entry by entry, quantities by what they come to."""
    if observed == wanted:
        return True
    if isinstance(wanted, dict):
        return isinstance(observed, dict) and all(
            name in observed and holds(observed[name], one, key if key in _QUANTITIES else name)
            for name, one in wanted.items()
        )
    if isinstance(wanted, list):
        same = isinstance(observed, list) and len(observed) == len(wanted)
        return same and all(holds(one, other) for one, other in zip(observed, wanted, strict=True))
    return key in _QUANTITIES and _amount(observed) == _amount(wanted)


def _before(owner: Owner, version: str) -> Object:
    port = {"name": "http", "port": HTTP_PORT, "targetPort": HTTP_PORT, "protocol": "TCP"}
    return {"ports": [port], "selector": _selector(owner, version)}


def _backend(name: str, share: int) -> Object:
    return {"kind": "Service", "name": name, "port": HTTP_PORT, "weight": share}


def _selector(owner: Owner, version: str) -> dict[str, str]:
    return {MODEL_LABEL: label_of(owner.name), VERSION_LABEL: version}


def _labels(owner: Owner, version: str = "") -> dict[str, str]:
    return PART_LABELS | {MODEL_LABEL: label_of(owner.name)} | ({VERSION_LABEL: version} if version else {})


def _object(owner: Owner, kind: Kind, name: str, labels: dict[str, str], content: Object) -> Object:
    digest = hashlib.sha256(json.dumps([labels, content], sort_keys=True).encode()).hexdigest()
    return {
        "apiVersion": kind.version,
        "kind": kind.name,
        "metadata": {
            "name": name,
            "namespace": owner.namespace,
            "labels": labels,
            "annotations": {WANTED: digest[:16]},
            "ownerReferences": [
                {"apiVersion": API, "kind": KIND, "name": owner.name, "uid": owner.uid, "controller": True}
            ],
        },
        "spec": content,
    }


def _fitted(name: str, ending: str) -> str:
    """Both as one label of DNS: a name that does not fit is cut, and told apart by its digest."""
    if _PLAIN.fullmatch(name + ending):
        return name + ending
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    beginning = re.sub(r"[^a-z0-9]+", "-", name)[: _LABEL - len(f"m--{digest}{ending}")].strip("-")
    return f"m-{beginning}-{digest}{ending}"


def _amount(quantity: Any) -> Decimal | str:
    """What it comes to: the API server writes it in its own way."""
    found = _QUANTITY.fullmatch(str(quantity))
    if not found:
        return str(quantity)
    number, unit = found.groups()
    if unit == "m":
        return Decimal(number) / 1000
    power = "kMGTP".index(unit[0].replace("K", "k")) + 1 if unit else 0
    return Decimal(number) * (1024 if unit.endswith("i") else 1000) ** power
