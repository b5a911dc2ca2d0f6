"""MLflow that asks who one is, as the chart starts it: a real server with the chart's arguments and settings."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helming import EVERYTHING, Document, find, render

from nvila.components.contracts.environment import Environment, for_child, named
from nvila.components.contracts.errors import NvilaError
from nvila.infra.controller.registry import Registry
from nvila.infra.controller.seen import Aliases

ADMIN = ("admin", "a long password 1")
SETTINGS = "/etc/nvila-mlflow/basic_auth.ini"


def _container(documents: list[Document]) -> Document:
    pod = find(documents, "Deployment", "nvila-mlflow")["spec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mounts[str(Path(SETTINGS).parent)]]
    assert volume["configMap"]["name"] == "nvila-mlflow-auth"
    return dict(pod["containers"][0])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The chart's own command; the database, the folder of artifacts and the port are the test's."""
    folder = tmp_path_factory.mktemp("mlflow")
    here = ['mlflow.postgres.mode="own"', 'mlflow.listen="0.0.0.0"', 'proxy.url=""', 'certificates={"enabled":false}']
    documents = render(EVERYTHING, sets=[*here, 'certificates.bundle=""', 'pods.mlflow.env.TOKEN=""'])
    container = _container(documents)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    database = f"sqlite:///{folder}/mlflow.db"
    store = next(a.partition("=")[2] for a in container["args"] if a.startswith("--backend-store-uri="))
    ours = {"host": "127.0.0.1", "port": port, "backend-store-uri": database, "workers": 1}
    ours |= {"artifacts-destination": folder / "artifacts", "expose-prometheus": folder / "metrics"}
    arguments = [a for a in container["args"] if a.split("=")[0].removeprefix("--") not in ours]
    arguments += [f"--{name}={value}" for name, value in ours.items()]

    text = find(documents, "ConfigMap", "nvila-mlflow-auth")["data"][Path(SETTINGS).name]
    assert f"database_uri = {store}\n" in text, "users are in another database than the one that is backed up"
    settings = folder / "basic_auth.ini"
    settings.write_text(text.replace(store, database), encoding="utf-8")
    secret = dict(zip(("username", "password"), ADMIN, strict=True)) | {"session-key": "signs forms"}
    given: dict[str, str] = {}
    for one in container["env"]:
        reference: Any = one.get("valueFrom", {}).get("secretKeyRef", {})
        if reference.get("name") == "nvila-mlflow-auth":
            given[one["name"]] = secret[reference["key"]]
        elif one["name"].startswith("MLFLOW_") and "value" in one and "S3" not in one["name"]:
            given[one["name"]] = str(settings) if one["value"] == SETTINGS else one["value"]
    program = [str(Path(sys.executable).with_name("mlflow")), *container["command"][1:], *arguments]
    with (folder / "log").open("w") as log:
        # A group of its own: the server's workers go with it.
        process = subprocess.Popen(program, env=for_child(given), stdout=log, stderr=log, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{port}"
            while _status(f"{address}/health") != 200:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _status(url: str, user: tuple[str, str] | None = None) -> int:
    request = urllib.request.Request(url)
    if user:
        request.add_header("Authorization", "Basic " + b64encode(":".join(user).encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _controller(server: str, name: str, password: str) -> Registry:
    """Its registry, with what its pod reads of the Secret nvila-credentials."""
    given = named(mlflow_tracking_uri=server, mlflow_username=name, mlflow_password=password)
    return Registry(Environment.read(given))


@pytest.mark.turns(3, 1)
def test_strangers_are_asked_who_they_are_and_probes_are_not(server: str) -> None:
    """A kubelet that has to log in restarts the server for ever; a registry without a login is anybody's."""
    registry = f"{server}/api/2.0/mlflow/registered-models/search"
    assert _status(f"{server}/health") == 200
    assert [_status(url) for url in (registry, f"{server}/metrics", server)] == [401, 401, 401]
    assert _status(registry, ("admin", "wrong")) == 401
    assert [_status(url, ADMIN) for url in (registry, f"{server}/metrics")] == [200, 200]


@pytest.mark.turns(3, 1)
def test_only_who_may_change_a_model_promotes_it(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the alias `challenger` a version gets users' requests: reading a model must not be enough to set it."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.server.auth.client import AuthServiceClient

    def be(name: str, password: str) -> MlflowClient:
        # As pods show themselves, from the Secret nvila-credentials.
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        return MlflowClient(server)

    be(*ADMIN)
    users = AuthServiceClient(server)
    for name in ("nvila", "reader"):
        users.create_user(name, f"{name}'s password")
    client = be("nvila", "nvila's password")
    client.create_registered_model("digits")
    run = client.create_run(client.create_experiment("runs")).info
    client.create_model_version("digits", f"{run.artifact_uri}/model", run_id=run.run_id)
    client.set_registered_model_alias("digits", "challenger", "1")

    client = be("reader", "reader's password")
    assert client.get_model_version_by_alias("digits", "challenger").version == "1"
    for forbidden in (
        lambda: client.set_registered_model_alias("digits", "champion", "1"),
        lambda: client.delete_registered_model_alias("digits", "challenger"),
        lambda: client.set_model_version_tag("digits", "1", "nvila.approved-by", "reader"),
    ):
        with pytest.raises(MlflowException, match="Permission denied"):
            forbidden()

    # The controller speaks for itself, without MLflow's client.
    controller = _controller(server, "nvila", "nvila's password")
    controller.point("digits", "champion", "1")
    assert controller.aliases()["digits"] == Aliases(challenger="1", champion="1")
    reader = _controller(server, "reader", "reader's password")
    assert reader.aliases()["digits"].champion == "1"
    for refused in (lambda: reader.drop("digits", "challenger"), _controller(server, "", "").aliases):
        with pytest.raises(NvilaError, match=r"HTTP status 40[13]"):
            refused()

    be("nvila", "nvila's password")
    AuthServiceClient(server).grant_user_permission("reader", "registered_model", "digits", "EDIT")
    be("reader", "reader's password").set_registered_model_alias("digits", "champion", "1")


def test_prometheus_logs_in() -> None:
    """It would be told 401, and an alert on a missing metric never fires."""
    sets = ['mlflow.postgres.mode="own"']
    (endpoint,) = find(render(EVERYTHING, sets=sets), "ServiceMonitor", "nvila-mlflow")["spec"]["endpoints"]
    assert endpoint["basicAuth"]["username"] == {"name": "nvila-credentials", "key": "MLFLOW_TRACKING_USERNAME"}
    assert endpoint["basicAuth"]["password"]["key"] == "MLFLOW_TRACKING_PASSWORD"
