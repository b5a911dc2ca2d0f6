"""What a cluster is looked at for, on a real API server: any `KUBECONFIG`, with the definitions of `NVILA_CRDS`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila.pipelines.planning.checks import Cluster, Need, look

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
def client() -> Any:
    """The API server, as the current context, with the definitions installed."""
    for variable in ("KUBECONFIG", "NVILA_CRDS"):
        if not os.environ.get(variable):
            pytest.skip(f"{variable} is not set")
    from kubernetes import client, config

    made = config.new_client_from_config(os.environ["KUBECONFIG"])
    definitions = client.ApiextensionsV1Api(made)
    for name in NEEDED:
        _define(definitions, Path(os.environ["NVILA_CRDS"], f"{name}.yaml"))
    return made


def _define(definitions: Any, file: Path) -> None:
    """A definition that is not there yet, in the form that an old test cluster takes."""
    text = file.read_text()
    name = yaml.safe_load(text)["metadata"]["name"]
    if any(item.metadata.name == name for item in definitions.list_custom_resource_definition().items):
        return
    if tools := os.environ.get("NVILA_KUBE_TOOLS"):
        command = [sys.executable, str(Path(tools, "crd-downgrade.py")), str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    definitions.create_custom_resource_definition(yaml.safe_load(text))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        status = definitions.read_custom_resource_definition(name).status
        if any(c.type == "Established" and c.status == "True" for c in status.conditions or []):
            time.sleep(1)  # discovery follows a moment later
            return
        time.sleep(0.1)
    raise AssertionError(f"{name} is not served")


@pytest.fixture
def cluster(client: Any) -> Iterator[Cluster]:
    """A namespace of its own."""
    name = f"nvila-plan-{uuid.uuid4().hex[:8]}"
    _call(client, "POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    yield Cluster(client, "test", name)
    _call(client, "DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture
def make(client: Any, cluster: Cluster) -> Iterator[Make]:
    """`make(path, name, **content)`: an object, in the namespace where the path has `{ns}`; the others go again."""
    made: list[str] = []

    def create(path: str, name: str, **content: Any) -> None:
        at = path.format(ns=cluster.namespace)
        _call(client, "POST", at, {"metadata": {"name": name} | content.pop("metadata", {})} | content)
        if "{ns}" not in path:
            made.append(f"{at}/{name}")

    yield create
    for path in made:
        _call(client, "DELETE", path)


def _call(client: Any, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:
    group = path.split("/")[2:4] if path.startswith("/apis/") else ["v1"]
    if method == "POST":
        body = {"apiVersion": "/".join(group)} | body
    return client.call_api(
        path, method, body=body, header_params={"Content-Type": kind}, response_type="object",
        auth_settings=["BearerToken"], _return_http_data_only=True,
    )  # fmt: skip


def _texts(cluster: Cluster, need: Need) -> tuple[str, str]:
    """What is refused, and what is remarked."""
    findings = look(cluster, need, "h100")
    assert [f.refused for f in findings] == sorted((f.refused for f in findings), reverse=True)
    return ("\n".join(f.text for f in findings if f.refused is kind) for kind in (True, False))  # type: ignore[return-value]


def _set_up(make: Make, cluster: Cluster, gpus: int) -> None:
    """A namespace as the chart leaves it, with a queue of so many GPUs."""
    queue = f"{cluster.namespace}-queue"
    settings = {
        "NVILA_SITE": "nvila.infra.launch.launcher",
        "NVILA_TRAINING_RUNTIME": f"{cluster.namespace}-torch",
        "NVILA_QUEUE": "nvila",
        "NVILA_GPUS_PER_NODE": "8",
    }
    make("/api/v1/namespaces/{ns}/configmaps", "nvila-site", data=settings)
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")
    make("/api/v1/namespaces/{ns}/secrets", "nvila-credentials", stringData=dict.fromkeys(keys, "x"))
    for claim in ("nvila", "nvila-cache"):
        size = {"requests": {"storage": "1Gi"}}
        spec = {"accessModes": ["ReadWriteMany"], "storageClassName": "none", "resources": size}
        make("/api/v1/namespaces/{ns}/persistentvolumeclaims", claim, spec=spec)
    container = {"name": "node", "image": "nvila"}
    template = {"spec": {"template": {"spec": {"containers": [container], "restartPolicy": "Never"}}}}
    make(
        "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes",
        f"{cluster.namespace}-torch",
        kind="ClusterTrainingRuntime",
        spec={"template": {"spec": {"replicatedJobs": [{"name": "node", "template": template}]}}},
    )
    kueue = cluster.version("kueue.x-k8s.io", "localqueues")
    flavor = {"name": "gpu", "resources": [{"name": "nvidia.com/gpu", "nominalQuota": str(gpus)}]}
    make(
        f"/apis/kueue.x-k8s.io/{kueue}/clusterqueues",
        queue,
        kind="ClusterQueue",
        spec={
            "namespaceSelector": {},
            "resourceGroups": [{"coveredResources": ["nvidia.com/gpu"], "flavors": [flavor]}],
        },
    )
    make(
        f"/apis/kueue.x-k8s.io/{kueue}/namespaces/{{ns}}/localqueues",
        "nvila",
        kind="LocalQueue",
        spec={"clusterQueue": queue},
    )


@pytest.fixture
def nodes(client: Any, make: Make) -> None:
    """Two nodes of 8 GPUs that no pod is put on."""
    for number in range(2):
        name = f"nvila-plan-{uuid.uuid4().hex[:8]}-{number}"
        taint = {"key": "nvila-test", "effect": "NoSchedule"}
        label = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
        make("/api/v1/nodes", name, metadata={"labels": label}, spec={"taints": [taint]})
        status = {
            "allocatable": {"nvidia.com/gpu": "8"},
            "capacity": {"nvidia.com/gpu": "8"},
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        _call(client, "PATCH", f"/api/v1/nodes/{name}/status", {"status": status}, "application/merge-patch+json")


def test_an_empty_namespace_is_refused_with_what_to_do(cluster: Cluster) -> None:
    """A run there would stand still for a claim, hours after it was submitted, with no word."""
    refused, remarked = _texts(cluster, LARGE)
    assert f"no volume claim nvila in {cluster.namespace};" in refused and "no volume claim nvila-cache" in refused
    assert "16 processes do not fit one pod" in refused and "--launch pods" in remarked
    assert "no AWS_ACCESS_KEY_ID and no AWS_SECRET_ACCESS_KEY" in refused and "no HF_TOKEN" in remarked


@pytest.mark.usefixtures("nodes")
def test_a_namespace_of_the_chart_passes(cluster: Cluster, make: Make) -> None:
    """A plan that cries wolf is not read."""
    _set_up(make, cluster, gpus=16)
    refused, remarked = _texts(cluster, LARGE)
    assert refused == ""
    assert remarked.count("\n") == 1 and remarked.count("is Pending") == 2, "claims without a class wait"


@pytest.mark.usefixtures("nodes")
def test_too_little_quota_is_told_from_quota_that_is_taken(client: Any, cluster: Cluster, make: Make) -> None:
    """The one never starts, the other waits; nobody should cancel a run that only waits."""
    _set_up(make, cluster, gpus=8)
    make("/api/v1/namespaces/{ns}/resourcequotas", "gpus", spec={"hard": {"requests.nvidia.com/gpu": "8"}})
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
    make("/api/v1/namespaces/{ns}/pods", "taker", spec=pod)
    deadline = time.monotonic() + 15
    while "are taken" not in (texts := tuple(_texts(cluster, small)))[1] and time.monotonic() < deadline:
        time.sleep(0.3)  # the controller counts
    assert texts[0] == "" and "ResourceQuota gpus: 4 of 8 GPUs are taken, a stage asks for 8" in texts[1]


def test_nodes_that_are_not_there_are_counted(cluster: Cluster, make: Make) -> None:
    """Quota for GPUs that nobody has bought yet."""
    _set_up(make, cluster, gpus=800)
    refused, _ = _texts(cluster, Need(gpus=800, can_do_without=False, s3=False, hub=False))
    assert "a stage asks for 100 nodes of 8 GPUs, " in refused
    refused, remarked = _texts(cluster, Need(gpus=800, can_do_without=True, s3=False, hub=False))
    assert refused == "" and "take --launch cpu" in remarked


def test_what_this_account_may_not_see_is_said(client: Any, cluster: Cluster) -> None:
    """A scientist may not list nodes or read secrets: that is no fault of the cluster."""
    from kubernetes.client import ApiClient

    nobody = ApiClient(client.configuration)
    nobody.set_default_header("Impersonate-User", "nobody-of-this-test")
    findings = look(Cluster(nobody, "test", cluster.namespace), LARGE, "h100")
    assert all("may not look" in f.text for f in findings if not f.refused and "names no" not in f.text)
    assert {f.text.partition(":")[0] for f in findings} >= {"the nodes", "the quota", "the credentials"}
