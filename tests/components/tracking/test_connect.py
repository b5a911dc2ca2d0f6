"""What comes of an MLflow that is away, is none, or lets nobody in."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nvila.components.contracts.addresses import file_path
from nvila.components.contracts.environment import Environment, entered
from nvila.components.contracts.errors import ConfigError, NvilaError, Unreachable
from nvila.components.contracts.locks import is_held
from nvila.components.serve.ports import free_port
from nvila.components.tracking import connect
from nvila.components.tracking.connect import connected, tracking_uri, wait_for
from nvila.components.tracking.named import named
from nvila.components.tracking.registry import models


@contextmanager
def server(status: int, body: bytes = b"<html>\n<body>a page</body></html>", port: int = 0) -> Iterator[str]:
    """Something that answers everything in the same way, and is no MLflow."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Answer) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://user:pass-word@127.0.0.1:{listening.server_port}"
        listening.shutdown()


def refusal(uri: str, runs: Path) -> NvilaError:
    with entered(Environment(mlflow_tracking_uri=uri)), pytest.raises(NvilaError) as caught:
        named("champion", runs)
    assert "\n" not in str(caught.value) and "pass-word" not in str(caught.value)
    return caught.value


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setattr(connect, "PATIENCE_SECONDS", 0.5)


def test_a_server_that_is_away_is_no_fault_of_ours(tmp_path: Path) -> None:
    """Commands must end with 75 and one line, as for S3 and the hub, and not with a traceback."""
    away = refusal(f"http://127.0.0.1:{free_port('127.0.0.1')}", tmp_path)
    assert isinstance(away, Unreachable) and "refused" in str(away)
    with server(503) as uri:
        assert isinstance(refusal(uri, tmp_path), Unreachable)


@pytest.mark.parametrize(("status", "body"), [(401, b"no"), (403, b'{"error_code": "PERMISSION_DENIED"}'), (404, b"")])
def test_a_wrong_address_or_password_is_the_users_to_mend(tmp_path: Path, status: int, body: bytes) -> None:
    """Asking again would change nothing."""
    with server(status, body) as uri:
        error = refusal(uri, tmp_path)
    assert isinstance(error, ConfigError) and "MLFLOW_TRACKING_URI" in str(error)


def test_what_is_no_mlflow_is_named(tmp_path: Path) -> None:
    """A proxy's log-in page, a scheme that MLflow does not know, and a file that is no database have one line each."""
    with server(200) as uri:
        assert isinstance(refusal(uri, tmp_path), ConfigError)
    assert "ftp" in str(refusal("ftp://127.0.0.1/x", tmp_path))
    for folder in ("mlruns", "./mlruns", str(tmp_path / "m"), (tmp_path / "m").as_uri()):
        assert "a folder cannot be the tracking store" in str(refusal(folder, tmp_path))
    (tmp_path / "mlflow.db").write_text("no database at all")
    with entered(Environment()), pytest.raises(ConfigError, match="file is not a database"):
        models(tmp_path)


def test_waiting_for_a_server_keeps_nobody_from_the_local_store(tmp_path: Path) -> None:
    """A run at work beside it stood still while `nvila trace` asked a server that was away."""
    with (
        server(200) as uri,
        entered(Environment(mlflow_tracking_uri=uri)),
        connected(tmp_path),
        (tmp_path / ".mlflow.lock").open("w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_store_has_one_lock_whoever_uses_it(tmp_path: Path, empty_mlflow: Path) -> None:
    """Two folders of runs with one database: both registered the model, one of them ended in an error."""
    (tmp_path / "shared.db").write_bytes(empty_mlflow.read_bytes())
    uri = f"sqlite:///{tmp_path}/shared.db"
    with entered(Environment(mlflow_tracking_uri=uri)):
        with connected(tmp_path / "a"):
            assert is_held(connect._lock(uri, tmp_path / "b")) is True
        assert connect._lock("http://h", tmp_path / "a") == connect._lock("http://h", tmp_path / "b")
    with entered(Environment()):
        own = [connect._lock(tracking_uri(tmp_path / name), tmp_path / name) for name in "ab"]
        assert own == [tmp_path / name / ".mlflow.lock" for name in "ab"]


def test_a_store_that_comes_back_within_the_bound_was_waited_for_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow itself tries for four minutes, in silence, and a server that is started again takes half a minute."""
    port = free_port("127.0.0.1")
    with entered(Environment(mlflow_tracking_uri=f"http://127.0.0.1:{port}")), ExitStack() as stack:
        with pytest.raises(Unreachable, match="same command again"):
            wait_for(tmp_path, 0)
        threading.Timer(1.5, lambda: stack.enter_context(server(200, port=port))).start()
        wait_for(tmp_path, 60)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "60 s at most" in said and str(port) in said


def test_names_of_folders_do_not_reach_sql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow puts the working directory into a statement as it is: in `it's` no store could be made."""
    folder = tmp_path / 'it\'s :x \\ "y"'
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("_MLFLOW_SERVER_ARTIFACT_ROOT", raising=False)
    with entered(Environment()), connected(Path("runs")) as client:
        place = file_path(client.get_experiment("0").artifact_location)
    assert place == folder / "runs" / "mlartifacts" / "0"
