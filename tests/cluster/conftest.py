"""Tests against a real cluster: any `KUBECONFIG`, with the custom resources of the folder `NVILA_CRDS`.

`NVILA_KUBE_TOOLS` names a folder with `up.sh` and `crd-downgrade.py` where the cluster is a test cluster of this
machine; only then may a test stop its API server.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from kube import CRDS, ApiServer, install_crd, write_kubeconfig, write_status
from launches import Launch

from nvila.components.kube.cluster import Cluster
from nvila.components.kube.connect import connect
from nvila.components.kube.requests import Patience, Requests
from nvila.infra.launch.jobs import ADVICE, Jobs

QUICK = Patience(contact_seconds=10, denied_seconds=1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test below this folder is one of the cluster."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


def variable(name: str, what: str) -> str:
    """The variable's value; without it the test is skipped and says so."""
    value = os.environ.get(name)
    if not value:
        pytest.skip(f"{name} is not set ({what})")
    return value


@pytest.fixture(scope="session")
def kubeconfig() -> Path:
    """A kubeconfig whose current context may do everything."""
    return Path(variable("KUBECONFIG", "a cluster to test against"))


@pytest.fixture(scope="session")
def admin(kubeconfig: Path) -> Requests:
    """The API server, as the current context."""
    return Requests(connect(str(kubeconfig)), QUICK, ADVICE)


@pytest.fixture(scope="session")
def crds(admin: Requests) -> Path:
    """The folder of custom resource definitions, with those of Kubeflow Trainer installed."""
    folder = Path(variable("NVILA_CRDS", "a folder of CustomResourceDefinition files"))
    for name in CRDS:
        install_crd(admin, folder / f"{name}.yaml")
    return folder


@pytest.fixture
def namespace(admin: Requests) -> Iterator[str]:
    """A namespace of its own, deleted afterwards."""
    name = f"nvila-test-{uuid.uuid4().hex[:8]}"
    admin.ask("POST", "/api/v1/namespaces", body={"metadata": {"name": name}})
    yield name
    admin.ask("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture
def namespaced(kubeconfig: Path, namespace: str, tmp_path: Path) -> Path:
    """A kubeconfig whose current context has that namespace as its default."""
    return write_kubeconfig(kubeconfig, tmp_path / "kubeconfig", namespace)


@pytest.fixture
def cluster(crds: Path, namespaced: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The test's namespace; `KUBECONFIG` points there too."""
    monkeypatch.setenv("KUBECONFIG", str(namespaced))
    return Cluster(Requests(connect(str(namespaced)), QUICK, ADVICE))


@pytest.fixture
def set_status(admin: Requests, namespace: str) -> Callable[..., None]:
    """`set_status(job, "Complete", message="...")`: what Kubeflow Trainer would write, by hand."""

    return partial(write_status, admin, namespace)


@pytest.fixture
def api_server(kubeconfig: Path) -> Iterator[ApiServer]:
    """Only of a test cluster that may be stopped; it runs again when the test is over."""
    tools = Path(variable("NVILA_KUBE_TOOLS", "the folder of up.sh: a test cluster that may be stopped"))
    state = kubeconfig.parent
    if not (state / "pid" / "kube-apiserver").is_file():
        pytest.skip(f"{kubeconfig} does not lie in the state folder of {tools}")
    yield ApiServer(tools, state)
    ApiServer(tools, state).start()


@pytest.fixture
def launch(cluster: Cluster, tmp_path: Path) -> Iterator[Launch]:
    """Work for two whole nodes that nobody has done before."""
    found = Launch.of_new_work(tmp_path, Jobs(cluster))
    yield found
    found.end()
