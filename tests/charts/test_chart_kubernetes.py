"""Every rendered document against the schemas of Kubernetes 1.29 to 1.35 and of the custom resources."""

import copy
import functools
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from helming import EVERYTHING, EXAMPLES, Document, render
from jsonschema import Draft202012Validator

from nvila.infra.launch.jobs import JOBSET_LABEL

VERSIONS = [f"1.{minor}" for minor in range(29, 36)]
CASES = [(), (EVERYTHING,), *((path,) for path in EXAMPLES)]
CUSTOM = (
    "gateway.networking.k8s.io",
    "kueue.x-k8s.io",
    "monitoring.coreos.com",
    "pipelines.kubeflow.org",
    "trainer.kubeflow.org",
)
WITHOUT_SCHEMA = {("monitoring.coreos.com/v1", "PodMonitor")}
"""Of those the tests' folder may have no definition; `test_chart_monitoring.py` looks at their fields."""


def _custom(document: Document) -> bool:
    return document["apiVersion"].split("/")[0] in CUSTOM


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_document(version: str) -> None:
    """A field in the wrong place is dropped or refused, depending on the server; strict schemas refuse it here."""
    validate = pytest.importorskip("kubernetes_validate", reason="make tools").validate
    for values in CASES:
        documents = [document for document in render(*values) if not _custom(document)]
        assert len(documents) > 10
        for document in documents:
            validate(document, version, strict=True)


def test_the_strict_schemas_see_a_wrong_field() -> None:
    """Otherwise the test above would pass whatever is rendered."""
    module = pytest.importorskip("kubernetes_validate", reason="make tools")
    (deployment,) = [d for d in render() if d["kind"] == "Deployment"]
    broken = copy.deepcopy(dict(deployment))
    broken["spec"]["template"]["spec"]["containers"][0]["imagePullSecret"] = "registry"
    with pytest.raises(module.ValidationError):
        module.validate(broken, VERSIONS[-1], strict=True)


def _schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """By API version and kind."""
    folder = os.environ.get("NVILA_CRDS")
    if not folder:
        pytest.skip("NVILA_CRDS names no folder of custom resource definitions")
    return _read_schemas(folder)


@functools.cache
def _read_schemas(folder: str) -> dict[tuple[str, str], dict[str, Any]]:
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


@pytest.mark.parametrize("values", CASES, ids=lambda case: case[0].stem if case else "default")
def test_the_custom_resources_fit_their_definitions(values: tuple[Path, ...]) -> None:
    """helm and kubectl know nothing of these; the controllers' API servers refuse what does not fit."""
    schemas = _schemas()
    documents = [d for d in render(*values) if _custom(d) and (d["apiVersion"], d["kind"]) not in WITHOUT_SCHEMA]
    assert documents
    for document in documents:
        schema = copy.deepcopy(schemas[document["apiVersion"], document["kind"]])
        schema["properties"]["metadata"] = {"type": "object"}
        Draft202012Validator(schema).validate(document)


def test_a_job_draws_near_its_own_pods_only() -> None:
    """Drawn by another job's pods as well, the second job of a team would be torn between two racks."""
    (runtime,) = [d for d in render(sets=['trainer.topologyKey="rack"']) if d["kind"] == "ClusterTrainingRuntime"]
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (wish,) = pod["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert wish["podAffinityTerm"]["topologyKey"] == "rack"
    assert wish["podAffinityTerm"]["matchLabelKeys"] == [JOBSET_LABEL]
    schema = _schemas()[runtime["apiVersion"], runtime["kind"]]
    Draft202012Validator(schema["properties"]["spec"]).validate(runtime["spec"])


def test_without_kueue_its_topology_takes_nothing_away() -> None:
    """values-16x8.yaml with kueue.enabled=false: nothing would keep the pods of a job in a rack any more."""
    (runtime,) = [d for d in render(EVERYTHING, sets=["kueue.enabled=false"]) if d["kind"] == "ClusterTrainingRuntime"]
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert "affinity" in pod["spec"] and not [key for key in pod["metadata"]["annotations"] if "kueue" in key]


def test_a_flavor_without_labels_and_taints_fits_too() -> None:
    """Its `spec` would be null, which the API server refuses, also when an upgrade takes its last field away."""
    documents = render(sets=["kueue.enabled=true", "gpu.tolerations=[]"])
    assert [d["spec"] for d in documents if d["kind"] == "ResourceFlavor"] == [{"tolerations": []}]


def test_a_wrong_field_of_a_custom_resource_is_seen() -> None:
    """Otherwise the test above would pass whatever is rendered."""
    schema = _schemas()["trainer.kubeflow.org/v1alpha1", "ClusterTrainingRuntime"]
    (runtime,) = [d for d in render() if d["kind"] == "ClusterTrainingRuntime"]
    for change in ({"maxRestart": 3}, {"maxRestarts": "three"}):
        broken = copy.deepcopy(dict(runtime))
        broken["spec"]["template"]["spec"]["failurePolicy"].update(change)
        assert not Draft202012Validator(schema).is_valid(broken)
