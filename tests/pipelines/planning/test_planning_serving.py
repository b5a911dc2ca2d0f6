"""What a plan says of pods that serve the model, on an API server of this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apiserver import ApiServer, forbidden, running
from typer.testing import CliRunner

from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.kube.cluster import Cluster
from nvila.pipelines.cli import app
from nvila.pipelines.planning.checks import configured
from nvila.pipelines.planning.serving import serving_plan, weights_bytes
from nvila.pipelines.planning.shape import shape_of

SITE = {"serving": {"image": "i", "gateway": {"name": "public"}, "pods": {"replicas": 2, "nodeSelector": {"a": "b"}}}}


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with running() as found:
        found.put("apis/gateway.networking.k8s.io/v1/namespaces/team-a/gateways/public")
        found.put("api/v1/namespaces/team-a/configmaps/nvila-site", data={"NVILA_SITE": json.dumps(SITE)})
        yield found


def recipe(name: str = "nvila-8b", target: str = "kubernetes") -> Recipe:
    return fill_in(Form(recipe=name, target=target))


def node(server: ApiServer, name: str, gpus: str, labels: dict[str, str] | None = None, **spec: Any) -> None:
    allocatable = {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": gpus}
    ready = {"allocatable": allocatable, "conditions": [{"type": "Ready", "status": "True"}]}
    server.put(f"api/v1/nodes/{name}", metadata={"labels": labels or {"a": "b"}}, status=ready, spec=spec)


def found(server: ApiServer, folder: Path) -> tuple[list[str], list[str]]:
    """What is refused, and what is remarked."""
    cluster = configured(server.kubeconfig(folder), None)
    assert isinstance(cluster, Cluster)
    _, findings = serving_plan(recipe(), None, cluster)
    return [one.text for one in findings if one.refused], [one.text for one in findings if not one.refused]


def test_nodes_have_to_hold_two_versions(server: ApiServer, tmp_path: Path) -> None:
    """A canary whose pods wait for ever is refused after half an hour; the plan knows it before the training."""
    node(server, "one", "3")
    node(server, "cordoned", "8", unschedulable=True)
    node(server, "elsewhere", "8", {"a": "c"})
    (refused,), _ = found(server, tmp_path)
    assert "1 nodes have room for 3 serving pods of 1 nvidia.com/gpu" in refused and "takes 4" in refused
    node(server, "two", "1")
    assert found(server, tmp_path) == ([], [])


def test_a_quota_that_others_have_taken_is_only_told(server: ApiServer, tmp_path: Path) -> None:
    """Training that holds the GPUs now ends before the rollout begins; a quota of three can never hold four."""
    node(server, "one", "8")
    key = "requests.nvidia.com/gpu"
    status = {"used": {key: "5"}}
    server.put("api/v1/namespaces/team-a/resourcequotas/q", spec={"hard": {key: "6"}}, status=status)
    assert found(server, tmp_path) == ([], [f"ResourceQuota q: 5 of 6 {key} are taken, a new version takes 2"])
    server.put("api/v1/namespaces/team-a/resourcequotas/q", spec={"hard": {key: "3"}})
    assert "allows 3" in found(server, tmp_path)[0][0]
    server.refuse = {"api/v1/namespaces/team-a/resourcequotas": forbidden("resourcequotas")}
    assert "may not look" in found(server, tmp_path)[1][0]


def test_a_cluster_that_serves_nothing_is_refused(server: ApiServer, tmp_path: Path) -> None:
    """As preflight does, before anything is paid for."""
    node(server, "one", "8")
    server.served.clear()
    assert "controller.enabled" in found(server, tmp_path)[0][0]


def test_weights_are_as_large_as_their_schemes_make_them() -> None:
    """Half a byte for each weight of the language model's blocks, a byte in the tower's, two for the rest."""
    small = recipe("nvila-lite-2b")
    shape = shape_of(small.model)
    assert shape is not None
    size = weights_bytes(small.quantize, shape)
    assert 1.5e9 < size < 1.8e9  # Qwen2.5-1.5B: 1.3 billion in blocks, 0.2 in embeddings; SigLIP 0.4
    whole = small.quantize.model_copy(update={"llm": "none", "vision_tower": "none"})
    assert weights_bytes(whole, shape) == 2 * shape.total


def test_the_plan_shows_it(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For people and for programs, with a cluster and without; nothing where the model is served elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", server.kubeconfig(tmp_path))
    monkeypatch.setenv("COLUMNS", "500")

    def plan(*words: str) -> str:
        return CliRunner().invoke(app, ["plan", "micro", "-o", "rollout.target=kubernetes", *words]).stdout

    shown = " ".join(plan("--no-cluster").split())
    assert "serving takes 2 nvidia.com/gpu and 64 GiB of memory while a new version is tried" in shown
    assert "to fetch at the assumed 125 MB/s" in shown
    told = json.loads(plan("--json"))
    assert (told["serving"]["gpus"], told["serving"]["known"], told["serving"]["pods"]["replicas"]) == (4, True, 2)
    assert any("0 nodes have room" in one["text"] and one["refused"] for one in told["findings"])
    assert json.loads(plan("--json", "-o", "rollout.target=none"))["serving"] is None
