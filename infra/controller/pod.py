"""The pod that serves a version, as plain data: what brings its weights, then `nvila serve` with its own Envoy."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from nvila.components.contracts.environment import name_of
from nvila.components.contracts.modelrollout import CONTAINER, FETCH, HTTP_PORT, METRICS_PORT, Spec
from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.contracts.serving import Pods
from nvila.components.kube.cluster import Object
from nvila.infra.controller.seen import Registered

if TYPE_CHECKING:
    from nvila.infra.controller.objects import Platform

USER = 65532
"""Of our images."""
CACHE = "/cache"
SERVED = f"{CACHE}/served"
"""Folder of verified models, each under the digest of its manifest."""
GRACE_SECONDS = 180
"""For the last answers of a pod that is told to end."""
LEAVING_SECONDS = 5
"""From then until its server is told: so long may a Gateway still send it requests."""
PROBE_SECONDS = 5
STARTING_SECONDS = 86_400
"""Most that a server may load. When it is late is the policy's, which must not make other pods when it is changed."""
_FETCH_SECRETS = ("mlflow_username", "mlflow_password", "mlflow_token", "s3_key", "s3_secret")
"""What fetches the weights shows; the other credentials are nothing to it."""


def pod(spec: Spec, version: Registered, platform: Platform, fallback: str) -> Object:
    """Its specification.

    Args:
        spec: what people decide.
        version: with the digest of its manifest.
        platform: the images' and the cache's.
        fallback: `host:port` that answers what this pod fails to answer.
    """
    asked, pods = _resources(spec.pods), spec.pods
    secrets = dict.fromkeys((*platform.pull_secrets, *pods.image_pull_secrets))
    content = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "serviceAccountName": pods.service_account_name,
        "priorityClassName": pods.priority_class_name,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "imagePullSecrets": [{"name": name} for name in secrets],
        "nodeSelector": pods.node_selector,
        "tolerations": pods.tolerations,
        "affinity": pods.affinity,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "initContainers": [_fetch(spec, version, platform, asked)],
        "containers": [_endpoint(spec, version, platform, asked, fallback)],
        "volumes": [
            {"name": "cache", "persistentVolumeClaim": {"claimName": platform.cache_claim}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": pods.shared_memory}},
        ],
    }
    return {name: value for name, value in content.items() if value not in ("", [], {})}


def options(settings: EndpointSettings) -> list[str]:
    """What differs from the defaults, as `nvila serve --option` reads it."""
    found = []
    for name, field in EndpointSettings.model_fields.items():
        if (value := getattr(settings, name)) != field.default:
            found += ["--option", f"{name}={','.join(value) if isinstance(value, list) else json.dumps(value)}"]
    return found


def _fetch(spec: Spec, version: Registered, platform: Platform, asked: Object) -> Object:
    """It asks for as much as what comes after it, which costs nothing, as the two never run at the same time."""
    given = {"--model": spec.model, "--version": version.version, "--digest": version.digest, "--into": SERVED}
    return {
        "name": FETCH,
        "image": platform.fetch_image,
        "command": ["python", "-m", "nvila.components.serve.weights", *_words(given)],
        "envFrom": [{"configMapRef": {"name": "nvila-site", "optional": True}}],
        "env": [_secret(name_of(field)) for field in _FETCH_SECRETS],
        "resources": asked,
        **_container(platform, _mount("cache", CACHE)),
    }


def _endpoint(spec: Spec, version: Registered, platform: Platform, asked: Object, fallback: str) -> Object:
    given = {
        "--host": "0.0.0.0",
        "--port": str(HTTP_PORT),
        "--name": spec.model,
        "--version": version.version,
        "--metrics-port": str(METRICS_PORT),
        "--fallback": fallback,
        "--runs": "/tmp/runs",
    }
    folder = f"{SERVED}/{version.digest}/model"
    gpus = {spec.pods.gpu_resource: str(spec.pods.gpus)} if spec.pods.gpus else {}
    return {
        "name": CONTAINER,
        "image": spec.image,
        "command": ["nvila", "serve", folder, "--foreground", *_words(given), *options(spec.endpoint)],
        "env": [_secret(name_of("api_key"))],
        "ports": [
            {"name": "http", "containerPort": HTTP_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
        ],
        "startupProbe": _probe("http", STARTING_SECONDS // PROBE_SECONDS),
        "readinessProbe": _probe("http", 3),
        "livenessProbe": _probe("metrics", 6),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(LEAVING_SECONDS)]}}},
        "resources": {part: {**amounts, **gpus} for part, amounts in asked.items()},
        **_container(platform, _mount("cache", CACHE, readOnly=True), _mount("shm", "/dev/shm")),
    }


def _container(platform: Platform, *mounts: Object) -> Object:
    """What both have."""
    return {
        "imagePullPolicy": platform.pull_policy,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [*mounts, _mount("tmp", "/tmp")],
    }


def _resources(pods: Pods) -> Object:
    return {"requests": {"cpu": pods.cpu, "memory": pods.memory}, "limits": {"memory": pods.memory}}


def _mount(volume: str, path: str, **how: bool) -> Object:
    return {"name": volume, "mountPath": path, **how}


def _secret(name: str) -> Object:
    reference = {"name": "nvila-credentials", "key": name, "optional": True}
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


def _probe(port: str, times: int) -> Object:
    get = {"path": "/health", "port": port}
    return {"httpGet": get, "periodSeconds": PROBE_SECONDS, "timeoutSeconds": PROBE_SECONDS, "failureThreshold": times}


def _words(given: dict[str, str]) -> list[str]:
    return [word for pair in given.items() for word in pair]
