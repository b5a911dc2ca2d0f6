"""Every rendered document against the schemas of Kubernetes 1.29 to 1.35 and of the custom resources."""

import copy
from pathlib import Path
from typing import Any

import pytest
from drawing import Refused, draw, fault
from helming import EVERYTHING, EXAMPLES, render
from jsonschema import Draft202012Validator
from places import variable
from schemas import VERSIONS, custom, custom_faults, custom_schemas, faults
from turns import TODAY

from nvila.infra.launch.jobs import JOBSET_LABEL

CASES = [(), (EVERYTHING,), *((path,) for path in EXAMPLES)]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_document(version: str) -> None:
    """A field in the wrong place is dropped or refused, depending on the server; strict schemas refuse it here."""
    pytest.importorskip("kubernetes_validate", reason="make tools")
    for values in CASES:
        documents = [document for document in render(*values) if not custom(document)]
        assert len(documents) > 10
        assert [fault for document in documents for fault in faults(document, version)] == []


def test_the_strict_schemas_see_a_wrong_field() -> None:
    """Otherwise the test above would pass whatever is rendered."""
    pytest.importorskip("kubernetes_validate", reason="make tools")
    (deployment,) = [d for d in render() if d["kind"] == "Deployment"]
    broken = copy.deepcopy(dict(deployment))
    broken["spec"]["template"]["spec"]["containers"][0]["imagePullSecret"] = "registry"
    assert any("imagePullSecret" in fault for fault in faults(broken, VERSIONS[-1]))


@pytest.mark.parametrize("number", range(3))
def test_whatever_the_schema_takes_kubernetes_takes(number: int) -> None:
    """A value that the schema lets in and the API server refuses ends an install half-way. Other draws each day;
    `tests/bench/run.py cluster` makes 500. The seed of a failure stands in its message."""
    pytest.importorskip("kubernetes_validate", reason="make tools")
    seed = TODAY * 3 + number
    try:
        found = fault(draw(seed))
    except Refused:
        return
    assert found is None, f"seed {seed}: {found}"


def _schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """By API version and kind."""
    return custom_schemas(variable("NVILA_CRDS"))


@pytest.mark.parametrize("values", CASES, ids=lambda case: case[0].stem if case else "default")
def test_the_custom_resources_fit_their_definitions(values: tuple[Path, ...]) -> None:
    """helm and kubectl know nothing of these; the controllers' API servers refuse what does not fit."""
    variable("NVILA_CRDS")
    documents = [document for document in render(*values) if custom(document)]
    assert documents
    assert [fault for document in documents for fault in custom_faults(document)] == []


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
