"""What preflight says of a cluster that is to serve the model, on an API server of this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from apiserver import ApiServer, forbidden, rollout_path, running

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import PreflightError, Unreachable
from nvila.components.contracts.site import Site
from nvila.components.preflight import serving
from nvila.components.preflight.step import refuse

SERVING: dict[str, Any] = {
    "image": "r/serve:1",
    "gateway": {"name": "public", "namespace": "infra"},
    "pods": {"replicas": 2, "gpus": 1, "memory": "32Gi", "cpu": "8"},
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    with running() as found:
        found.put("apis/gateway.networking.k8s.io/v1/namespaces/infra/gateways/public")
        yield found


def problems(server: ApiServer, folder: Path, said: dict[str, Any] | None = SERVING) -> str:
    site = Site.read({"NVILA_SITE": json.dumps({"serving": said})}) if said else None
    return "\n".join(serving.problems("small", Environment(kubeconfig=server.kubeconfig(folder), site=site)))


def quota(server: ApiServer, **hard: str) -> None:
    server.put("api/v1/namespaces/team-a/resourcequotas/mine", spec={"hard": hard})


def test_a_cluster_that_can_serve_is_let_through(server: ApiServer, tmp_path: Path) -> None:
    """A check that refuses a good cluster costs every run; a quota that just holds two versions is enough."""
    assert problems(server, tmp_path) == ""
    quota(server, **{"requests.nvidia.com/gpu": "4", "limits.memory": "128Gi", "requests.cpu": "32", "pods": "4"})
    assert problems(server, tmp_path) == ""


@pytest.mark.parametrize(
    ("key", "hard", "wanted"),
    [
        ("requests.nvidia.com/gpu", "3", "4"),
        ("limits.memory", "100Gi", "137438953472"),
        ("requests.memory", "64Gi", "137438953472"),
        ("memory", "64Gi", "137438953472"),
        ("requests.cpu", "31500m", "32"),
        ("cpu", "2", "32"),
        ("pods", "3", "4"),
    ],
)
def test_a_quota_without_room_for_two_versions(
    server: ApiServer, tmp_path: Path, key: str, hard: str, wanted: str
) -> None:
    """The canary's pods would not come, after days of training."""
    quota(server, **{key: hard})
    assert f"mine allows {hard} of {key}" in (said := problems(server, tmp_path)) and f"takes {wanted}" in said


def test_the_modelrollout_counts_where_there_is_one(server: ApiServer, tmp_path: Path) -> None:
    """People have changed its pods and its Gateway since a run made it from the site."""
    pods = {"replicas": 1, "gpus": 8, "gpuResource": "amd.com/gpu"}
    server.rollout("small", pods=pods, gateway={"name": "inner"})
    quota(server, **{"requests.amd.com/gpu": "15", "requests.nvidia.com/gpu": "0"})
    said = problems(server, tmp_path)
    assert "no Gateway inner in namespace team-a" in said and "amd.com/gpu" in said and "nvidia" not in said


def test_what_is_not_there_is_told(server: ApiServer, tmp_path: Path) -> None:
    """Definition, Gateway API, Gateway and site: each has another remedy."""
    assert "controller.gateway" in problems(server, tmp_path, None)
    server.objects.clear()
    assert "no Gateway public in namespace infra" in problems(server, tmp_path)
    del server.served["gateway.networking.k8s.io"]
    assert "install the Gateway API" in problems(server, tmp_path)
    server.served.clear()
    assert "controller.enabled" in problems(server, tmp_path)
    assert "set KUBECONFIG" in "".join(serving.problems("small", Environment()))


def test_a_registry_of_this_machine_is_refused(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alias would be set in a file that no controller reads, and the run would wait until the deadline."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "set MLFLOW_TRACKING_URI" in problems(server, tmp_path)


def test_rights_that_only_help_are_not_asked_for(server: ApiServer, tmp_path: Path) -> None:
    """The controller tells of a missing Gateway too; without the right to ModelRollouts the run comes to nothing."""
    server.refuse = {
        "apis/gateway.networking.k8s.io": forbidden("gateways"),
        "api/v1/namespaces/team-a/resourcequotas": forbidden("resourcequotas"),
    }
    assert problems(server, tmp_path) == ""
    server.refuse = {rollout_path("").rstrip("/"): forbidden("modelrollouts.nvila.io")}
    assert "Role nvila-rollout" in problems(server, tmp_path)


def test_an_api_server_that_is_away_may_come_back(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """75 and not 2: the same command goes on later."""
    server.away = True
    here = Environment(kubeconfig=server.kubeconfig(tmp_path))
    with pytest.raises(Unreachable, match="does not answer"):
        refuse(serving.problems("small", here))
    with pytest.raises(PreflightError):
        refuse([*serving.problems("small", here), "another problem"])
