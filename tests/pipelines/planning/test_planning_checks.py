"""What a plan says of clusters that no test server here is set up like; the objects are written down."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes.client import ApiException

from nvila.components.contracts.errors import PreflightError
from nvila.components.kube.cluster import Cluster
from nvila.components.kube.connect import Connection
from nvila.components.kube.errors import NotThere
from nvila.components.kube.requests import Patience, Requests
from nvila.pipelines.planning.checks import Need, look

SITE = {"launcher": "nvila.infra.launch.launcher", "gpus_per_node": 8, "node_cpu": "0", "node_memory": "0"}
LARGE = Need(gpus=12, can_do_without=False, s3=False, hub=False)


class Written:
    """Stands for the API server: a namespace that has everything but GPUs; `objects` by path come before that."""

    connection = Connection(None, "written", "team")

    def __init__(self, settings: Mapping[str, Any], objects: Mapping[str, Any] | None = None) -> None:
        claim = {"status": {"phase": "Bound"}}
        self._objects = {
            "/api/v1/namespaces/team/configmaps/nvila-site": {"data": {"NVILA_SITE": json.dumps(settings)}},
            **_served("trainer.kubeflow.org", "v1alpha1", "trainjobs"),
            "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/nvila-torch": {},
            "/api/v1/namespaces/team": {},
            "/api/v1/namespaces/team/resourcequotas": {"items": []},
            "/api/v1/nodes": {"items": []},
            **{f"/api/v1/namespaces/team/persistentvolumeclaims/{name}": claim for name in ("nvila", "nvila-cache")},
        } | dict(objects or {})

    def ask(self, method: str, path: str, **_: Any) -> dict[str, Any]:
        if path not in self._objects:
            raise NotThere(path)
        return self._objects[path]


def written(settings: Mapping[str, Any], objects: Mapping[str, Any] | None = None) -> Cluster:
    return Cluster(Written(settings, objects))  # type: ignore[arg-type]


def _served(group: str, version: str, plural: str) -> dict[str, Any]:
    """What discovery says of a resource that a group serves."""
    return {
        f"/apis/{group}": {"versions": [{"groupVersion": f"{group}/{version}"}]},
        f"/apis/{group}/{version}": {"resources": [{"name": plural}]},
    }


def _node(resource: str) -> dict[str, Any]:
    return {
        "metadata": {},
        "status": {"allocatable": {resource: "8"}, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def test_a_site_without_gpus_can_be_planned_for() -> None:
    """`gpu.perNode: 0` of the chart ended in a division by zero."""
    assert look(written(SITE | {"gpus_per_node": 0}), LARGE, "h100")[1] == []


def test_a_site_of_the_old_form_is_planned_for_and_told() -> None:
    """The next release does not read it, and would plan for another cluster."""
    data = {"NVILA_SITE": SITE["launcher"], "NVILA_GPUS_PER_NODE": "0", "NVILA_NODE_CPU": "0"}
    _, findings = look(written({}, {"/api/v1/namespaces/team/configmaps/nvila-site": {"data": data}}), LARGE, "h100")
    assert [(f.refused, "upgrade the chart" in f.text) for f in findings] == [(False, True)]


def test_processes_that_do_not_fill_nodes_are_refused() -> None:
    """The launcher refuses them too, but only when everything before the first stage has been paid for."""
    nodes = {"/api/v1/nodes": {"items": [_node("nvidia.com/gpu")] * 2}}
    _, findings = look(written(SITE, nodes), LARGE, "h100")
    (refused,) = [f.text for f in findings if f.refused]
    assert refused.startswith("train.gpus: the processes do not fill nodes of 8 GPUs (got 12). Ask for a multiple of 8")


def test_gpus_are_counted_under_the_sites_name() -> None:
    """A cluster that counts them otherwise has GPUs all the same, and quota of them."""
    quota = {"items": [{"metadata": {"name": "gpus"}, "spec": {"hard": {"requests.example.com/h100": "4"}}}]}
    objects = {
        "/api/v1/nodes": {"items": [_node("example.com/h100")]},
        "/api/v1/namespaces/team/resourcequotas": quota,
    }
    need = Need(gpus=8, can_do_without=False, s3=False, hub=False)
    _, findings = look(written(SITE | {"gpu_resource": "example.com/h100"}, objects), need, "h100")
    assert [f.text for f in findings] == ["ResourceQuota gpus allows 4 GPUs, a stage asks for 8"]


@pytest.mark.parametrize(
    ("gpus", "offered", "fits"),
    [
        (8, {"cpu": "95500m", "memory": "1900Gi"}, False),
        (8, {"cpu": "192", "memory": "1100Gi"}, False),
        (8, {"cpu": "96", "memory": "1258291200Ki"}, True),
        (4, {"cpu": "48", "memory": "600Gi"}, True),
        (16, {"cpu": "95500m", "memory": "1900Gi"}, False),
    ],
)
def test_a_training_pod_must_fit_its_node(gpus: int, offered: dict[str, str], fits: bool) -> None:
    """A node of 96 CPUs gives pods less than 96: jobs waited for ever, and the plan had nothing to say."""
    node = _node("nvidia.com/gpu")
    node["status"]["allocatable"] |= offered
    site = SITE | {"node_cpu": "96", "node_memory": "1200Gi"}
    need = Need(gpus=gpus, can_do_without=False, s3=False, hub=False)
    _, findings = look(written(site, {"/api/v1/nodes": {"items": [node] * 2}}), need, "h100")
    assert [f.refused for f in findings] == ([] if fits else [True])
    assert fits or "lower the chart's trainer.cpu" in findings[0].text


def test_numbers_are_read_as_kubernetes_writes_them() -> None:
    """A quota of 1000 GPUs is `1k`, and was a traceback."""
    hard = {"requests.nvidia.com/gpu": "1k"}
    quota = {"items": [{"metadata": {"name": "gpus"}, "spec": {"hard": hard}, "status": {"used": hard}}]}
    resources = [{"name": "nvidia.com/gpu", "nominalQuota": "1k"}]
    objects = {
        "/api/v1/nodes": {"items": [_node("nvidia.com/gpu")]},
        "/api/v1/namespaces/team/resourcequotas": quota,
        **_served("kueue.x-k8s.io", "v1beta1", "localqueues"),
        "/apis/kueue.x-k8s.io/v1beta1/namespaces/team/localqueues/q": {"spec": {"clusterQueue": "c"}},
        "/apis/kueue.x-k8s.io/v1beta1/clusterqueues/c": {
            "spec": {"resourceGroups": [{"flavors": [{"resources": resources}]}]}
        },
    }
    need = Need(gpus=8, can_do_without=False, s3=False, hub=False)
    _, findings = look(written(SITE | {"queue": "q"}, objects), need, "h100")
    assert [f.text for f in findings] == ["ResourceQuota gpus: 1000 of 1000 GPUs are taken, a stage asks for 8"]


def test_an_expired_token_is_not_a_missing_right() -> None:
    """`may not look` seven times, and a run that counts as not refused."""

    class Expired:
        configuration = SimpleNamespace(host="https://gone")

        def call_api(self, *_: Any, **__: Any) -> None:
            raise ApiException(status=401)

    gone = Requests(Connection(Expired(), "gone", "team"), Patience.once(1.0))
    with pytest.raises(PreflightError, match="https://gone: the API server lets nobody in"):
        look(Cluster(gone), LARGE, "h100")
