"""What a cluster is looked at for, on a real API server: any `KUBECONFIG`, with the definitions of `NVILA_CRDS`."""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "cluster"))
from kube import install_crd

from nvila.components.kube.cluster import CONFIG_MAP, NODE, POD, QUOTA, SECRET, VOLUME_CLAIM, Cluster, Kind
from nvila.components.kube.connect import connect
from nvila.components.kube.requests import Patience, Requests
from nvila.pipelines.planning.checks import Need, look

pytestmark = pytest.mark.cluster

NEEDED = (
    "trainer.kubeflow.org_trainjobs",
    "trainer.kubeflow.org_clustertrainingruntimes",
    "kueue.x-k8s.io_localqueues",
    "kueue.x-k8s.io_clusterqueues",
)
LARGE = Need(gpus=16, can_do_without=False, s3=True, hub=True)
Make = Callable[..., None]


@pytest.fixture(scope="module")
def admin() -> Requests:
    """The API server, as the current context, with the definitions installed."""
    for variable in ("KUBECONFIG", "NVILA_CRDS"):
        if not os.environ.get(variable):
            pytest.skip(f"{variable} is not set")
    requests = Requests(connect(os.environ["KUBECONFIG"]), Patience(denied_seconds=1))
    for name in NEEDED:
        install_crd(requests, Path(os.environ["NVILA_CRDS"], f"{name}.yaml"))
    time.sleep(1)  # discovery follows a moment later
    return requests


@pytest.fixture
def cluster(admin: Requests) -> Iterator[Cluster]:
    """A namespace of its own."""
    name = f"nvila-plan-{uuid.uuid4().hex[:8]}"
    admin.ask("POST", "/api/v1/namespaces", body={"metadata": {"name": name}})
    yield Cluster(Requests(replace(admin.connection, namespace=name), Patience.once(10)))
    admin.ask("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture
def make(admin: Requests, cluster: Cluster) -> Iterator[Make]:
    """`make(kind, name, **content)`: an object, in the namespace if there are such; the others go again."""
    made: list[str] = []

    def create(kind: Kind, name: str, **content: Any) -> None:
        cluster.create(kind, {"metadata": {"name": name} | content.pop("metadata", {})} | content)
        if not kind.namespaced:
            made.append(cluster.path(kind, name))

    yield create
    for path in made:
        admin.ask("DELETE", path)


def _texts(cluster: Cluster, need: Need) -> tuple[str, str]:
    """What is refused, and what is remarked."""
    _, findings = look(cluster, need, "h100")
    assert [f.refused for f in findings] == sorted((f.refused for f in findings), reverse=True)
    return ("\n".join(f.text for f in findings if f.refused is kind) for kind in (True, False))  # type: ignore[return-value]


def _set_up(make: Make, cluster: Cluster, gpus: int) -> None:
    """A namespace as the chart leaves it, with a queue of so many GPUs."""
    queue = f"{cluster.namespace}-queue"
    settings = {
        "launcher": "nvila.infra.launch.launcher",
        "training_runtime": f"{cluster.namespace}-torch",
        "queue": "nvila",
        "gpus_per_node": 8,
    }
    make(CONFIG_MAP, "nvila-site", data={"NVILA_SITE": json.dumps(settings)})
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")
    make(SECRET, "nvila-credentials", stringData=dict.fromkeys(keys, "x"))
    for claim in ("nvila", "nvila-cache"):
        size = {"requests": {"storage": "1Gi"}}
        spec = {"accessModes": ["ReadWriteMany"], "storageClassName": "none", "resources": size}
        make(VOLUME_CLAIM, claim, spec=spec)
    container = {"name": "node", "image": "nvila"}
    template = {"spec": {"template": {"spec": {"containers": [container], "restartPolicy": "Never"}}}}
    make(
        Kind("trainer.kubeflow.org/v1alpha1", "ClusterTrainingRuntime", "clustertrainingruntimes", namespaced=False),
        f"{cluster.namespace}-torch",
        spec={"template": {"spec": {"replicatedJobs": [{"name": "node", "template": template}]}}},
    )
    kueue = cluster.served_version("kueue.x-k8s.io", "localqueues") or "none"
    flavor = {"name": "gpu", "resources": [{"name": "nvidia.com/gpu", "nominalQuota": str(gpus)}]}
    make(
        Kind(kueue, "ClusterQueue", "clusterqueues", namespaced=False),
        queue,
        spec={
            "namespaceSelector": {},
            "resourceGroups": [{"coveredResources": ["nvidia.com/gpu"], "flavors": [flavor]}],
        },
    )
    make(Kind(kueue, "LocalQueue", "localqueues"), "nvila", spec={"clusterQueue": queue})


@pytest.fixture
def nodes(cluster: Cluster, make: Make) -> None:
    """Two nodes of 8 GPUs that no pod is put on."""
    for number in range(2):
        name = f"nvila-plan-{uuid.uuid4().hex[:8]}-{number}"
        taint = {"key": "nvila-test", "effect": "NoSchedule"}
        label = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
        make(NODE, name, metadata={"labels": label}, spec={"taints": [taint]})
        room = {"nvidia.com/gpu": "8", "cpu": "96", "memory": "1200Gi"}
        status = {
            "allocatable": room,
            "capacity": room,
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        cluster.patch(NODE, name, {"status": status}, "status")


def test_an_empty_namespace_is_refused_with_what_to_do(cluster: Cluster) -> None:
    """A run there would stand still for a claim, hours after it was submitted, with no word."""
    refused, remarked = _texts(cluster, LARGE)
    assert f"no volume claim nvila in {cluster.namespace};" in refused and "no volume claim nvila-cache" in refused
    assert "16 processes do not fit one pod" in refused and "pipelines.launch" in remarked
    assert "no AWS_ACCESS_KEY_ID and no AWS_SECRET_ACCESS_KEY" in refused and "no HF_TOKEN" in remarked


@pytest.mark.usefixtures("nodes")
def test_a_namespace_of_the_chart_passes(cluster: Cluster, make: Make) -> None:
    """A plan that cries wolf is not read."""
    _set_up(make, cluster, gpus=16)
    refused, remarked = _texts(cluster, LARGE)
    assert refused == ""
    assert remarked.count("\n") == 1 and remarked.count("is Pending") == 2, "claims without a class wait"


@pytest.mark.usefixtures("nodes")
def test_too_little_quota_is_told_from_quota_that_is_taken(cluster: Cluster, make: Make) -> None:
    """The one never starts, the other waits; nobody should cancel a run that only waits."""
    _set_up(make, cluster, gpus=8)
    make(QUOTA, "gpus", spec={"hard": {"requests.nvidia.com/gpu": "8"}})
    refused, _ = _texts(cluster, LARGE)
    assert "ResourceQuota gpus allows 8 GPUs, a stage asks for 16" in refused
    assert "holds 8 GPUs, a stage asks for 16: never admitted" in refused
    small = Need(gpus=8, can_do_without=False, s3=False, hub=False)
    pod = {
        "containers": [
            {"name": "a", "image": "a", "resources": {"limits": {"nvidia.com/gpu": "4"}}}
        ],
        "nodeSelector": {"nvila-test": "never"},
    }  # fmt: skip
    make(POD, "taker", spec=pod)
    deadline = time.monotonic() + 60
    while "are taken" not in (texts := tuple(_texts(cluster, small)))[1] and time.monotonic() < deadline:
        time.sleep(0.3)  # the controller counts, and not while it learns of new definitions
    assert texts[0] == "" and "ResourceQuota gpus: 4 of 8 GPUs are taken, a stage asks for 8" in texts[1]


def test_nodes_that_are_not_there_are_counted(cluster: Cluster, make: Make) -> None:
    """Quota for GPUs that nobody has bought yet."""
    _set_up(make, cluster, gpus=800)
    refused, _ = _texts(cluster, Need(gpus=800, can_do_without=False, s3=False, hub=False))
    assert "a stage asks for 100 nodes of 8 GPUs, " in refused
    refused, remarked = _texts(cluster, Need(gpus=800, can_do_without=True, s3=False, hub=False))
    assert refused == "" and "pipelines.launch=cpu" in remarked


def test_what_this_account_may_not_see_is_said(cluster: Cluster) -> None:
    """A scientist may not list nodes or read secrets: that is no fault of the cluster."""
    nobody = connect(os.environ["KUBECONFIG"], cluster.namespace)
    nobody.client.set_default_header("Impersonate-User", "nobody-of-this-test")
    _, findings = look(Cluster(Requests(nobody, Patience.once(10))), LARGE, "h100")
    assert all("may not look" in f.text for f in findings if not f.refused and "names no" not in f.text)
    assert {f.text.partition(":")[0] for f in findings} >= {"the nodes", "the quota", "the credentials"}
