"""The schemas of Kubernetes 1.29 to 1.35, and of custom resources where `NVILA_CRDS` names a folder of definitions."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from helming import Document
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

VERSIONS = tuple(f"1.{minor}" for minor in range(29, 36))
CUSTOM = (
    "gateway.networking.k8s.io",
    "kueue.x-k8s.io",
    "monitoring.coreos.com",
    "pipelines.kubeflow.org",
    "trainer.kubeflow.org",
)
WITHOUT_SCHEMA = {("monitoring.coreos.com/v1", "PodMonitor")}
"""Of those the tests' folder may have no definition; `test_chart_monitoring.py` looks at their fields."""


def custom(document: Document) -> bool:
    """Whether Kubernetes itself knows nothing of it."""
    return document["apiVersion"].split("/")[0] in CUSTOM


def faults(document: Document, version: str) -> Iterator[str]:
    """What an API server of this version refuses or drops, as `kubernetes_validate` has its schemas, strictly."""
    api = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", document["apiVersion"])
    for error in _validator(f"{document['kind'].lower()}-{api}", version).iter_errors(document):
        yield f"Kubernetes {version}: {error.json_path}: {error.message}"


@functools.cache
def _validator(name: str, version: str) -> Draft202012Validator:
    """Read once: the package itself reads some megabytes for each document."""
    from kubernetes_validate import utils

    found = [one for one in utils.all_versions() if utils.major_minor(one) == version][-1]
    schema = utils.schema_contents(f"kubernetes-json-schema/v{found}-local-strict/{name}.json", version)
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(found))


@functools.cache
def _definitions(version: str) -> Registry[Any]:
    from kubernetes_validate import utils

    contents = utils.schema_contents(f"kubernetes-json-schema/v{version}-local-strict/_definitions.json", version)
    return (Resource.from_contents(contents) @ Registry()).crawl()


def custom_faults(document: Document) -> Iterator[str]:
    """What the definition of a custom resource refuses; nothing where there is no definition."""
    kind = document["apiVersion"], document["kind"]
    folder = os.environ.get("NVILA_CRDS")
    if folder and kind not in WITHOUT_SCHEMA:
        schema = {**custom_schemas(folder)[kind]}
        schema["properties"] = {**schema["properties"], "metadata": {"type": "object"}}
        for error in Draft202012Validator(schema).iter_errors(document):
            yield f"{error.json_path}: {error.message}"


@functools.cache
def custom_schemas(folder: str) -> dict[tuple[str, str], dict[str, Any]]:
    """By API version and kind."""
    schemas = {}
    for path in sorted(Path(folder).glob("*.yaml")):
        for crd in filter(None, yaml.load_all(path.read_text(encoding="utf-8"), yaml.CSafeLoader)):
            for version in crd["spec"]["versions"]:
                api = f"{crd['spec']['group']}/{version['name']}"
                schemas[api, crd["spec"]["names"]["kind"]] = _strict(version["schema"]["openAPIV3Schema"])
    return schemas


def _strict(schema: Any) -> Any:
    """The schema as JSON Schema that refuses unknown fields, as the API server does under strict field validation."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    open_ = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and "properties" in schema and not open_:
        strict["additionalProperties"] = False
    return strict
