"""Requests to an API server that is away, overloaded, or something else: a small HTTP server plays these."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import PreflightError
from nvila.components.kube import requests
from nvila.components.kube.cluster import POD, Cluster
from nvila.components.kube.connect import connect
from nvila.components.kube.errors import Away, Conflict, NoCluster, Refused
from nvila.components.kube.requests import Advice, Patience, Requests

Answer = tuple[int, str]
FINE = (200, '{"kind": "TrainJob"}')


class Server(ThreadingHTTPServer):
    """Gives its answers one after the other; the last one again and again."""

    answers: list[Answer]
    asked = 0
    kubeconfig: str

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
    found.kubeconfig = _kubeconfig(tmp_path, found.server_address[1])
    monkeypatch.setattr(requests.time, "sleep", lambda seconds: None)
    yield found
    found.shutdown()
    found.server_close()


def _kubeconfig(folder: Path, port: int, scheme: str = "http") -> str:
    cluster = {"name": "c", "cluster": {"server": f"{scheme}://127.0.0.1:{port}"}}
    context = {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "team-a"}}
    content = {
        "clusters": [cluster],
        "contexts": [context],
        "current-context": "c",
        "users": [{"name": "u", "user": {}}],
    }
    (folder / "kubeconfig").write_text(json.dumps(content))
    return str(folder / "kubeconfig")


def _requests(server: Server, *how: Any) -> Requests:
    return Requests(connect(server.kubeconfig), *how)


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
    found = _requests(server)
    assert found.connection.namespace == "team-a"
    assert found.ask("GET", "/x") == {"kind": "TrainJob"}
    assert capsys.readouterr().err.count("asking again") == 1


def test_rights_that_stay_refused_are_told(server: Server) -> None:
    """An API server that has just started refuses everybody for some seconds; a missing Role is for ever."""
    message = 'trainjobs.trainer.kubeflow.org is forbidden: User "u" cannot get resource'
    server.answers = [(403, json.dumps({"kind": "Status", "reason": "Forbidden", "message": message}))]
    with pytest.raises(PreflightError, match=r"cannot get resource.*Role nvila-launcher"):
        _requests(server, Patience(denied_seconds=0.05), Advice(right="Role nvila-launcher")).ask("GET", "/x")
    assert server.asked > 1


def test_a_server_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong address looks like an outage; only who has been answered before waits for as long as it takes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        kubeconfig = _kubeconfig(tmp_path, free.getsockname()[1])
        monkeypatch.setattr(requests.time, "sleep", lambda seconds: None)
        with pytest.raises(Away, match="does not answer"):
            Requests(connect(kubeconfig), Patience(contact_seconds=0.05)).ask("GET", "/x")


def test_an_outage_is_waited_out_once_there_was_an_answer(server: Server) -> None:
    """The limit for the first contact must not end a job that has run for days."""
    server.answers = [FINE]
    found = _requests(server, Patience(contact_seconds=0.0))
    found.ask("GET", "/x")
    server.answers = [(503, "")] * 50 + [FINE]
    assert found.ask("GET", "/x") == {"kind": "TrainJob"}
    server.answers = [(503, "")]
    with pytest.raises(Away, match="503"):
        found.ask("GET", "/x", patience=Patience.within(0.5))


def test_what_was_granted_before_may_be_refused_for_a_while(server: Server) -> None:
    """Roles are made anew within a minute, or the service that checks tokens restarts: a job of days must not end."""
    server.answers = [FINE]
    found = _requests(server, Patience(denied_seconds=0.0))
    found.ask("GET", "/x")
    server.answers = [(401, "")] * 30 + [(403, "")] * 30 + [FINE]
    assert found.ask("GET", "/x") == {"kind": "TrainJob"}
    server.answers = [(403, "")]
    with pytest.raises(PreflightError):
        found.ask("GET", "/another")
    with pytest.raises(PreflightError):
        found.ask("GET", "/x", patience=Patience.within(0.5))


def test_a_balancer_without_a_server_is_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and closes it: that looks like a failed handshake, and ended jobs after 20 s."""
    monkeypatch.setattr(requests.time, "sleep", lambda seconds: None)
    with socket.create_server(("127.0.0.1", 0)) as balancer:
        kubeconfig = _kubeconfig(tmp_path, balancer.getsockname()[1], "https")
        found = Requests(connect(kubeconfig), Patience(denied_seconds=0.0))
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
        with pytest.raises(Away, match=r"does not answer: .*SSL"):
            found.ask("GET", "/x", patience=Patience.within(2.0))
        assert taken > 1


def test_a_rule_of_the_cluster_is_not_taken_for_a_missing_right(server: Server) -> None:
    """Trainer refuses a job whose runtime is missing with 403; a role bound for that changes nothing."""
    message = 'admission webhook "validator.trainjob" denied the request: clusterTrainingRuntime must be created before'
    server.answers = [(403, json.dumps({"kind": "Status", "reason": "Forbidden", "message": message}))]
    with pytest.raises(PreflightError, match="must be created before") as caught:
        _requests(server, Patience(denied_seconds=0.0), Advice(right="Role nvila-launcher")).ask("GET", "/x")
    assert "nvila-launcher" not in str(caught.value)


def test_a_write_at_the_same_moment_is_asked_again(server: Server) -> None:
    """A job's status changes while its label is set: the step ended with a traceback, beside a job that ran."""
    conflict = (409, json.dumps({"kind": "Status", "reason": "Conflict", "message": "the object has been modified"}))
    cluster = Cluster(_requests(server))
    server.answers = [conflict, conflict, FINE]
    cluster.patch(POD, "p", {"metadata": {"labels": {"a": "b"}}})
    assert server.asked == 3
    server.answers = [conflict]
    with pytest.raises(Conflict):
        cluster.delete(POD, "p", uid="of-another", version="1")
    with pytest.raises(Conflict):
        cluster.patch(POD, "p", {"metadata": {"resourceVersion": "1"}})
    with pytest.raises(Conflict):
        cluster.apply(POD, {"metadata": {"name": "p"}}, owner="us")
    assert server.asked == 6


def test_a_server_that_hangs_leaves_time_to_say_so(tmp_path: Path) -> None:
    """A step that is asked to stop has 30 s; one request that nobody answered took all of them."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        kubeconfig = _kubeconfig(tmp_path, silent.getsockname()[1])
        with pytest.raises(Away, match=r"does not answer: .*read timeout=0\.2"):
            Requests(connect(kubeconfig)).ask("GET", "/x", patience=Patience.within(0.2))


def test_a_refused_body_is_not_asked_again(server: Server) -> None:
    """It would be refused for ever."""
    server.answers = [(422, json.dumps({"kind": "Status", "message": "spec.trainer.numNodes: must be an integer"}))]
    with pytest.raises(Refused, match="numNodes"):
        _requests(server).ask("GET", "/x")
    assert server.asked == 1


def test_without_a_cluster_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's library would ask localhost."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(NoCluster, match="no pod with a service account"):
        connect(None)


SPOILT = [b"a: [b", b"contexts: [", b"hello", b"[]", b"contexts: 3\ncurrent-context: x", b"\xff\xfe"]
WITHOUT_A_CONTEXT = [None, b"", b"{clusters: [], contexts: [], users: []}"]


@pytest.mark.parametrize("content", [*SPOILT, *WITHOUT_A_CONTEXT])
def test_a_broken_kubeconfig_is_named(tmp_path: Path, content: bytes | None) -> None:
    """A traceback of the client's library does not say which file it read."""
    path = tmp_path / "broken"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PreflightError, match=f"KUBECONFIG={path}") as caught:
        connect(str(path))
    assert isinstance(caught.value, NoCluster) == (content in WITHOUT_A_CONTEXT)
