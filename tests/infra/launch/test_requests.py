"""Requests to an API server that is away, overloaded, or something else: a small HTTP server plays these."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nvila.components.contracts.errors import ConfigError, NvilaError, PreflightError
from nvila.infra.launch import requests
from nvila.infra.launch.cluster import Cluster
from nvila.infra.launch.requests import Patience, Requests

Answer = tuple[int, str]
FINE = (200, '{"kind": "TrainJob"}')


class Server(ThreadingHTTPServer):
    """Gives its answers one after the other; the last one again and again."""

    answers: list[Answer]
    asked = 0

    def next(self) -> Answer:
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        status, body = self.server.next()
        if status == 0:
            self.connection.close()
            return
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode(errors="surrogateescape"))

    do_PATCH = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    _kubeconfig(tmp_path, monkeypatch, found.server_address[1])
    monkeypatch.setattr(requests.time, "sleep", lambda seconds: None)
    yield found
    found.shutdown()
    found.server_close()


def _kubeconfig(folder: Path, patch: pytest.MonkeyPatch, port: int, scheme: str = "http") -> None:
    cluster = {"name": "c", "cluster": {"server": f"{scheme}://127.0.0.1:{port}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "team-a"}}
    content = {
        "clusters": [cluster],
        "contexts": [context],
        "current-context": "c",
        "users": [{"name": "u", "user": {}}],
    }
    (folder / "kubeconfig").write_text(json.dumps(content))
    patch.setenv("KUBECONFIG", str(folder / "kubeconfig"))


def test_what_passes_by_itself_is_asked_again(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Any of these happens while a control plane is upgraded; each would end the step."""
    html = "<html>bad gateway</html>"
    server.answers = [
        (0, ""),
        (502, html),
        (429, ""),
        (500, "{}"),
        (200, "half of an ans"),
        (200, "<p>d\udce9sol\udce9"),
        (200, "null"),
        (401, ""),
        (403, html),
        FINE,
    ]
    found = Requests()
    assert found.namespace == "team-a"
    assert found.ask("GET", "/x") == {"kind": "TrainJob"}
    assert capsys.readouterr().err.count("asking again") == 1


def test_rights_that_stay_refused_are_told(server: Server) -> None:
    """An API server that has just started refuses everybody for some seconds; a missing Role is for ever."""
    message = 'trainjobs.trainer.kubeflow.org is forbidden: User "u" cannot get resource'
    server.answers = [(403, json.dumps({"kind": "Status", "reason": "Forbidden", "message": message}))]
    with pytest.raises(PreflightError, match=r"cannot get resource.*Role nvila-launcher"):
        Requests(Patience(denied_seconds=0.05)).ask("GET", "/x")
    assert server.asked > 1


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong address looks like an outage; only who has been answered before waits for as long as it takes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _kubeconfig(tmp_path, monkeypatch, free.getsockname()[1])
        monkeypatch.setattr(requests.time, "sleep", lambda seconds: None)
        with pytest.raises(NvilaError, match="does not answer"):
            Requests(Patience(contact_seconds=0.05)).ask("GET", "/x")


def test_an_outage_is_waited_out_once_there_was_an_answer(server: Server) -> None:
    """The limit for the first contact must not end a job that has run for days."""
    server.answers = [FINE]
    found = Requests(Patience(contact_seconds=0.0))
    found.ask("GET", "/x")
    server.answers = [(503, "")] * 50 + [FINE]
    assert found.ask("GET", "/x") == {"kind": "TrainJob"}
    server.answers = [(503, "")]
    with pytest.raises(NvilaError, match="503"):
        found.ask("GET", "/x", within_seconds=0.05)


def test_what_was_granted_before_may_be_refused_for_a_while(server: Server) -> None:
    """Roles are made anew within a minute, or the service that checks tokens restarts: a job of days must not end."""
    server.answers = [FINE]
    found = Requests(Patience(denied_seconds=0.0))
    found.ask("GET", "/x")
    server.answers = [(401, "")] * 30 + [(403, "")] * 30 + [FINE]
    assert found.ask("GET", "/x") == {"kind": "TrainJob"}
    server.answers = [(403, "")]
    with pytest.raises(PreflightError):
        found.ask("GET", "/another")
    with pytest.raises(PreflightError):
        found.ask("GET", "/x", within_seconds=0.05)


def test_a_balancer_without_a_server_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and closes it: that looks like a failed handshake, and ended jobs after 20 s."""
    monkeypatch.setattr(requests.time, "sleep", lambda seconds: None)
    with socket.create_server(("127.0.0.1", 0)) as balancer:
        _kubeconfig(tmp_path, monkeypatch, balancer.getsockname()[1], "https")
        found = Requests(Patience(denied_seconds=0.0))
        taken = 0

        def balance() -> None:
            nonlocal taken
            while True:
                try:
                    connection, _ = balancer.accept()
                except OSError:
                    return
                taken += 1
                connection.recv(1 << 16)
                connection.close()

        threading.Thread(target=balance, daemon=True).start()
        with pytest.raises(PreflightError, match="lets nobody in"):
            found.ask("GET", "/x")
        found._answered, taken = True, 0
        with pytest.raises(NvilaError, match=r"does not answer: .*SSL") as caught:
            found.ask("GET", "/x", within_seconds=0.2)
        assert not isinstance(caught.value, PreflightError) and taken > 1


def test_a_rule_of_the_cluster_is_not_taken_for_a_missing_right(server: Server) -> None:
    """Trainer refuses a job whose runtime is missing with 403; a role bound for that changes nothing."""
    message = 'admission webhook "validator.trainjob" denied the request: clusterTrainingRuntime must be created before'
    server.answers = [(403, json.dumps({"kind": "Status", "reason": "Forbidden", "message": message}))]
    with pytest.raises(PreflightError, match="must be created before") as caught:
        Requests(Patience(denied_seconds=0.0)).ask("GET", "/x")
    assert "nvila-launcher" not in str(caught.value)


def test_a_write_at_the_same_moment_is_asked_again(server: Server) -> None:
    """A job's status changes while its label is set: the step ended with a traceback, beside a job that ran."""
    conflict = (409, json.dumps({"kind": "Status", "reason": "Conflict", "message": "the object has been modified"}))
    server.answers = [conflict, conflict, FINE]
    Cluster(Requests()).set_labels("j", {"a": "b"})
    assert server.asked == 3
    server.answers = [conflict]
    assert not Cluster(Requests()).delete({"metadata": {"name": "j", "uid": "of-another", "resourceVersion": "1"}})
    assert server.asked == 4


def test_a_server_that_hangs_leaves_time_to_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is asked to stop has 30 s; one request that nobody answered took all of them."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        _kubeconfig(tmp_path, monkeypatch, silent.getsockname()[1])
        with pytest.raises(NvilaError, match=r"does not answer: .*read timeout=0\.2"):
            Requests().ask("GET", "/x", within_seconds=0.2)


def test_a_refused_body_is_not_asked_again(server: Server) -> None:
    """It would be refused for ever."""
    server.answers = [(422, json.dumps({"kind": "Status", "message": "spec.trainer.numNodes: must be an integer"}))]
    with pytest.raises(ConfigError, match="numNodes"):
        Requests().ask("GET", "/x")
    assert server.asked == 1


def test_without_a_cluster_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """`NVILA_SITE` left in a shell makes every local run want a cluster."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PreflightError, match="unset NVILA_SITE"):
        Requests()


@pytest.mark.parametrize("content", [None, "", "a: [b", "{clusters: [], contexts: [], users: []}"])
def test_a_broken_kubeconfig_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    """A traceback of the client's library does not say which file it read."""
    path = tmp_path / "broken"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(PreflightError, match=f"KUBECONFIG={path}"):
        Requests()
