"""The registry by REST: a real MLflow server, and small servers that play one that is away, broken or another."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, DataError, NvilaError, Unreachable
from nvila.components.serve.ports import free_port
from nvila.components.tracking.registry import APPROVED_TAG, DIGEST_TAG, PINNED_TAG
from nvila.infra.controller import mlflow_server, registry
from nvila.infra.controller.mlflow_server import Unknown
from nvila.infra.controller.registry import Registry
from nvila.infra.controller.seen import Aliases, Registered

MODEL = "nvila-8b"
SERVE = """
import sys
from mlflow.server import app
app.run("127.0.0.1", int(sys.argv[1]), threaded=True)
"""


@pytest.fixture(scope="module")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's own application on sqlite, in one process, with artifacts behind it."""
    folder, port = tmp_path_factory.mktemp("server"), free_port("127.0.0.1")
    variables = {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], env={**os.environ, **variables}, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _healthy(url):
            assert server.poll() is None, "MLflow has ended"
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait()


def _healthy(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/health", timeout=2).status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def client(mlflow_url: str) -> Any:
    """MLflow's own, as a run of ours has it."""
    from mlflow import MlflowClient

    made = MlflowClient(mlflow_url)
    made.create_registered_model(MODEL)
    return made


@pytest.fixture
def ours(mlflow_url: str, client: Any) -> Registry:
    return Registry(Environment(mlflow_tracking_uri=mlflow_url))


def test_what_a_run_registers_is_read(ours: Registry, client: Any, tmp_path: Path) -> None:
    """A tag by another name, and no version would ever be tried."""
    run = client.create_run("0")
    logged = client.create_logged_model("0", name="m", source_run_id=run.info.run_id)
    file = tmp_path / "pinned.jsonl"
    file.write_bytes(os.urandom(300_000))
    client.log_model_artifacts(logged.model_id, str(tmp_path))
    tags = {DIGEST_TAG: "d" * 64, PINNED_TAG: "e" * 64, APPROVED_TAG: "grace"}
    made = client.create_model_version(
        MODEL, logged.artifact_location, run.info.run_id, tags=tags, model_id=logged.model_id
    )
    found = ours.version(MODEL, str(made.version))
    assert found and found.source == logged.artifact_location
    assert (found.digest, found.pinned, found.approved_by) == ("d" * 64, "e" * 64, "grace")
    partial = tmp_path / "partial"
    assert ours.artifact(found, "pinned.jsonl", partial, 300_000) == sha256(file.read_bytes()).hexdigest()
    assert partial.read_bytes() == file.read_bytes()
    partial.unlink()
    with pytest.raises(DataError, match="larger than 299,999"):
        ours.artifact(found, "pinned.jsonl", partial, 299_999)


def test_a_version_that_is_not_there_is_none(ours: Registry, client: Any) -> None:
    """A version that somebody deleted while it was tried would end the loop."""
    bare = client.create_model_version(MODEL, "s3://b/x")
    number = str(bare.version)
    assert ours.version(MODEL, number) == Registered(MODEL, number, source="s3://b/x")
    client.delete_model_version(MODEL, number)
    assert ours.version(MODEL, number) is ours.version(MODEL, "999") is ours.version("no-such-model", "1") is None


def test_aliases_are_moved_and_told(ours: Registry, client: Any) -> None:
    """Each write may be repeated, whatever the last one came to."""
    one, two = (str(client.create_model_version(MODEL, "s3://b/x").version) for _ in range(2))
    for _ in range(2):
        ours.point(MODEL, "champion", one)
        ours.point(MODEL, "challenger", two)
    client.set_registered_model_alias(MODEL, "of-others", two)
    assert ours.aliases()[MODEL] == Aliases(challenger=two, champion=one)
    for _ in range(2):
        ours.drop(MODEL, "challenger")
    assert ours.aliases()[MODEL] == Aliases(champion=one)
    with pytest.raises(Unknown):
        ours.point(MODEL, "champion", "999")
    with pytest.raises(Unknown):
        ours.drop("no-such-model", "champion")


def test_more_models_than_a_page_holds(ours: Registry, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second hundred of models would be forgotten, and their aliases count as removed."""
    monkeypatch.setattr(registry, "MODELS_A_PAGE", 3)
    names = [f"many-{number}" for number in range(7)]
    for name in names:
        client.create_registered_model(name)
        client.create_model_version(name, "s3://b/x")
        client.set_registered_model_alias(name, "challenger", "1")
    found = ours.aliases()
    assert [found[name] for name in names] == [Aliases(challenger="1")] * 7 and MODEL in found


def test_a_tag_is_kept_without_secrets_and_as_long_as_it_may_be(ours: Registry, client: Any) -> None:
    """A reason with the end of a log in it: MLflow refuses it, and the decision would be written for ever."""
    number = str(client.create_model_version(MODEL, "s3://b/x").version)
    ours.tag(MODEL, number, "nvila.rollout", "password=hunter2hunter2 \0" + "x" * 9000)
    kept = client.get_model_version(MODEL, number).tags["nvila.rollout"]
    assert "hunter2" not in kept and len(kept) == 5000
    ours.tag(MODEL, number, "nvila.rollout", "")
    assert client.get_model_version(MODEL, number).tags["nvila.rollout"] == ""
    with pytest.raises(Unknown):
        ours.tag(MODEL, "999", "nvila.rollout", "x")


Reply = Callable[[BaseHTTPRequestHandler], None]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Reply], Registry]]:
    """`played(reply)`: a registry whose server answers so."""
    monkeypatch.setattr(mlflow_server, "QUIET_SECONDS", 0.3)
    monkeypatch.setattr(mlflow_server, "SECONDS", 1.0)
    servers = []

    def serve(reply: Reply) -> Registry:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                reply(self)

            do_POST = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                return

        servers.append(server := ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        user = {"mlflow_username": "ada", "mlflow_password": "s3cr3t-Passw0rd"}
        return Registry(
            Environment.model_validate({"mlflow_tracking_uri": f"http://127.0.0.1:{server.server_port}/", **user})
        )

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def say(status: int, body: str, length: int | None = None) -> Reply:
    def reply(of: BaseHTTPRequestHandler) -> None:
        of.rfile.read(int(of.headers.get("Content-Length", 0)))
        of.send_response(status)
        of.send_header("Content-Length", str(len(body) if length is None else length))
        of.end_headers()
        of.wfile.write(body.encode())

    return reply


def silent(of: BaseHTTPRequestHandler) -> None:
    time.sleep(1)


def drip(of: BaseHTTPRequestHandler) -> None:
    say(200, "", 1000)(of)
    for _ in range(15):
        of.wfile.write(b" ")
        of.wfile.flush()
        time.sleep(0.1)


def hang_up(of: BaseHTTPRequestHandler) -> None:
    of.close_connection = True
    of.connection.close()


def error(code: str) -> str:
    return f'{{"error_code": "{code}", "message": "password=hunter2hunter2 is wrong"}}'


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (say(503, "<html>"), Unreachable),
        (say(500, error("INTERNAL_ERROR")), Unreachable),
        (say(429, "{}"), Unreachable),
        (say(200, '{"registered_models": [', 1000), Unreachable),
        (silent, Unreachable),
        (drip, Unreachable),
        (hang_up, Unreachable),
        (say(200, "<html>sign in</html>"), ConfigError),
        (say(200, "[]"), ConfigError),
        (say(302, ""), ConfigError),
        (say(404, "<html>"), ConfigError),
        (say(401, error("UNAUTHENTICATED")), ConfigError),
        (say(403, error("PERMISSION_DENIED")), ConfigError),
        (say(404, error("RESOURCE_DOES_NOT_EXIST")), Unknown),
        (say(400, error("INVALID_PARAMETER_VALUE")), NvilaError),
        (say(400, '{"error_code": 3}'), NvilaError),
    ],
)
def test_each_failure_has_its_kind(played: Callable[[Reply], Registry], reply: Reply, kind: type[NvilaError]) -> None:
    """A registry that is away must not look like one without aliases, nor a wrong password like an outage."""
    ours = played(reply)
    for ask in (ours.aliases, lambda: ours.point("m", "champion", "1")):
        with pytest.raises(NvilaError) as caught:
            ask()
        assert type(caught.value) is kind
        assert "hunter2" not in str(caught.value) and "s3cr3t" not in str(caught.value)


def test_a_connection_that_the_server_closed_meanwhile_is_no_outage(played: Callable[[Reply], Registry]) -> None:
    """Servers close idle connections after as many seconds as a round takes."""
    asked = list[str]()

    def reply(of: BaseHTTPRequestHandler) -> None:
        asked.append(of.headers["Authorization"])
        if len(asked) == 2:
            return hang_up(of)
        return say(200, "{}")(of)

    ours = played(reply)
    assert ours.aliases() == {} and ours.aliases() == {} and len(asked) == 3
    assert set(asked) == {"Basic YWRhOnMzY3IzdC1QYXNzdzByZA=="}


@pytest.mark.parametrize("uri", [None, "sqlite:///x.db", "mlruns"])
def test_a_registry_without_a_server_is_refused(uri: str | None) -> None:
    """The controller's pod has no such file, or another one than people have."""
    with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI: .*HTTP"):
        Registry(Environment(mlflow_tracking_uri=uri))
