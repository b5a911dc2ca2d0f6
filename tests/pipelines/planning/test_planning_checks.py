"""What a plan says of clusters that no test server here is set up like; the objects are written down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client import ApiException

from nvila.components.contracts.errors import PreflightError
from nvila.pipelines.planning.checks import Cluster, Need, look

SITE = {"NVILA_SITE": "nvila.infra.launch.launcher", "NVILA_GPUS_PER_NODE": "8"}
LARGE = Need(gpus=12, can_do_without=False, s3=False, hub=False)


class Written(Cluster):
    """A namespace that has everything but GPUs; `objects` by path come before that."""

    def __init__(self, settings: Mapping[str, str], objects: Mapping[str, Any] | None = None) -> None:
        super().__init__(None, "written", "team")
        trainer = {"versions": [{"version": "v1alpha1"}], "resources": [{"name": "trainjobs"}]}
        claim = {"status": {"phase": "Bound"}}
        self._objects = {
            "/api/v1/namespaces/team/configmaps/nvila-site": {"data": settings},
            "/apis/trainer.kubeflow.org": trainer,
            "/apis/trainer.kubeflow.org/v1alpha1": trainer,
            "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/nvila-torch": {},
            "/api/v1/namespaces/team": {},
            **{f"/api/v1/namespaces/team/persistentvolumeclaims/{name}": claim for name in ("nvila", "nvila-cache")},
        } | dict(objects or {})

    def get(self, path: str) -> dict[str, Any] | None:
        return self._objects.get(path)


def _node(resource: str) -> dict[str, Any]:
    return {
        "metadata": {},
        "status": {"allocatable": {resource: "8"}, "conditions": [{"type": "Ready", "status": "True"}]},
    }


def test_a_site_without_gpus_can_be_planned_for() -> None:
    """`gpu.perNode: 0` of the chart ended in a division by zero."""
    assert look(Written(SITE | {"NVILA_GPUS_PER_NODE": "0"}), LARGE, "h100") == []


def test_processes_that_do_not_fill_nodes_are_refused() -> None:
    """The launcher refuses them too, but only when everything before the first stage has been paid for."""
    nodes = {"/api/v1/nodes": {"items": [_node("nvidia.com/gpu")] * 2}}
    findings = look(Written(SITE, nodes), LARGE, "h100")
    assert [f.text for f in findings if f.refused] == [
        "train.gpus: 12 processes do not fill nodes of 8 GPUs; ask for a multiple, or fewer"
    ]


def test_gpus_are_counted_under_the_sites_name() -> None:
    """A cluster that counts them otherwise has GPUs all the same, and quota of them."""
    quota = {"items": [{"metadata": {"name": "gpus"}, "spec": {"hard": {"requests.example.com/h100": "4"}}}]}
    objects = {
        "/api/v1/nodes": {"items": [_node("example.com/h100")]},
        "/api/v1/namespaces/team/resourcequotas": quota,
    }
    need = Need(gpus=8, can_do_without=False, s3=False, hub=False)
    findings = look(Written(SITE | {"NVILA_GPU_RESOURCE": "example.com/h100"}, objects), need, "h100")
    assert [f.text for f in findings] == ["ResourceQuota gpus allows 4 GPUs, a stage asks for 8"]


@pytest.mark.parametrize("content", [b"contexts: [", b"hello", b"[]", b"contexts: 3\ncurrent-context: x", b"\xff\xfe"])
def test_a_spoilt_kubeconfig_is_named(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parser's traceback does not say which file."""
    spoilt = tmp_path / "kubeconfig"
    spoilt.write_bytes(content)
    monkeypatch.setenv("KUBECONFIG", str(spoilt))
    with pytest.raises(PreflightError, match="the kubeconfig cannot be read"):
        Cluster.connect(None, str(spoilt))


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
    site = SITE | {"NVILA_NODE_CPU": "96", "NVILA_NODE_MEMORY": "1200Gi"}
    need = Need(gpus=gpus, can_do_without=False, s3=False, hub=False)
    findings = look(Written(site, {"/api/v1/nodes": {"items": [node] * 2}}), need, "h100")
    assert [f.refused for f in findings] == ([] if fits else [True])
    assert fits or "lower the chart's trainer.cpu" in findings[0].text


def test_numbers_are_read_as_kubernetes_writes_them() -> None:
    """A quota of 1000 GPUs is `1k`, and was a traceback."""
    hard = {"requests.nvidia.com/gpu": "1k"}
    quota = {"items": [{"metadata": {"name": "gpus"}, "spec": {"hard": hard}, "status": {"used": hard}}]}
    resources = [{"name": "nvidia.com/gpu", "nominalQuota": "1k"}]
    kueue = {"versions": [{"version": "v1beta1"}], "resources": [{"name": "localqueues"}]}
    objects = {
        "/api/v1/nodes": {"items": [_node("nvidia.com/gpu")]},
        "/api/v1/namespaces/team/resourcequotas": quota,
        "/apis/kueue.x-k8s.io": kueue,
        "/apis/kueue.x-k8s.io/v1beta1": kueue,
        "/apis/kueue.x-k8s.io/v1beta1/namespaces/team/localqueues/q": {"spec": {"clusterQueue": "c"}},
        "/apis/kueue.x-k8s.io/v1beta1/clusterqueues/c": {
            "spec": {"resourceGroups": [{"flavors": [{"resources": resources}]}]}
        },
    }
    need = Need(gpus=8, can_do_without=False, s3=False, hub=False)
    findings = look(Written(SITE | {"NVILA_QUEUE": "q"}, objects), need, "h100")
    assert [f.text for f in findings] == ["ResourceQuota gpus: 1000 of 1000 GPUs are taken, a stage asks for 8"]


def test_an_expired_token_is_not_a_missing_right() -> None:
    """`may not look` seven times, and a run that counts as not refused."""

    class Expired:
        def call_api(self, *_: Any, **__: Any) -> None:
            raise ApiException(status=401)

    with pytest.raises(PreflightError, match="does not accept the credentials"):
        look(Cluster(Expired(), "gone", "team"), LARGE, "h100")
