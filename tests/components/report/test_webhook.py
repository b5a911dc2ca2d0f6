"""The webhook: a real receiver that checks the signature, fails, sends elsewhere, or is not there."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError, NvilaError
from nvila.components.report import webhook
from nvila.components.report.webhook import post

SECRET = "a secret of the team"


class Receiver(ThreadingHTTPServer):
    """Keeps what it gets and answers with its statuses, the last one again and again."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses = [204]
        self.got: list[tuple[dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hooks/very-secret-path"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, Receiver)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(server.statuses.pop(0) if len(server.statuses) > 1 else server.statuses[0])
        self.send_header("Location", server.url + "/elsewhere")
        self.end_headers()

    def do_GET(self) -> None:
        raise AssertionError("the message was redirected")

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(webhook, "PAUSES_SECONDS", (0.01, 0.01))
    found = Receiver()
    threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def expected(headers: dict[str, str], body: bytes, key: bytes) -> str:
    """The signature, computed as the receiver's documentation says."""
    signed = headers["webhook-id"].encode() + b"." + headers["webhook-timestamp"].encode() + b"." + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


@pytest.mark.parametrize(
    ("secret", "key"),
    [(SECRET, SECRET.encode()), ("whsec_" + base64.b64encode(b"\x00raw bytes").decode(), b"\x00raw bytes")],
)
def test_the_receiver_can_verify_what_it_gets(receiver: Receiver, secret: str, key: bytes) -> None:
    """A signature that no library accepts makes people switch the check off."""
    post(receiver.url, "run.succeeded", {"run": "r1"}, secret)
    ((headers, body),) = receiver.got
    assert headers["webhook-signature"] == expected(headers, body, key)
    assert headers["content-type"] == "application/json"
    told: dict[str, Any] = json.loads(body)
    assert (told["type"], told["data"], set(told)) == ("run.succeeded", {"run": "r1"}, {"type", "timestamp", "data"})


def test_a_receiver_that_is_busy_is_asked_again_with_the_same_id(receiver: Receiver) -> None:
    """Another id for the same event would have it handled twice."""
    receiver.statuses = [503, 429, 200]
    post(receiver.url, "run.failed", {}, SECRET)
    assert len(receiver.got) == 3
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


@pytest.mark.parametrize(("status", "attempts"), [(401, 1), (302, 1), (500, 3)])
def test_a_refusal_is_told_without_the_secret_path(receiver: Receiver, status: int, attempts: int) -> None:
    """The path of such URLs is often all that protects them, and the message goes to the run's log."""
    receiver.statuses = [status]
    with pytest.raises(NvilaError, match=str(status)) as caught:
        post(receiver.url, "run.failed", {}, SECRET)
    assert "secret-path" not in str(caught.value)
    assert len(receiver.got) == attempts


def test_a_url_that_cannot_be_used_is_not_shown(receiver: Receiver) -> None:
    """The HTTP library's own error repeats it."""
    with pytest.raises(NvilaError, match="InvalidURL") as caught:
        post(receiver.url + " x", "run.failed", {}, SECRET)
    assert "secret-path" not in str(caught.value)


def test_without_a_secret_nothing_is_signed(receiver: Receiver) -> None:
    """A signature with an empty key could be made by anybody."""
    post(receiver.url, "run.failed", {}, "")
    assert "webhook-signature" not in receiver.got[0][0]


def test_nobody_there_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not look like a fault in our code."""
    monkeypatch.setattr(webhook, "PAUSES_SECONDS", (0.01,))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(NvilaError, match="refused"):
            post(f"http://127.0.0.1:{free.getsockname()[1]}/", "run.failed", {}, SECRET)


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.com/x",
        "http://10.0.0.1/x",
        "http://2852039166/x",
        "https://user:word@example.com/x",
        "file:///etc/passwd",
        "",
    ],
)
def test_urls_that_would_give_something_away_are_refused(url: str) -> None:
    """Results travel in the clear, or a local file is read."""
    with pytest.raises(ConfigError, match="NVILA_WEBHOOK_URL"):
        post(url, "run.failed", {}, SECRET)


def test_names_inside_the_cluster_may_use_http() -> None:
    """Most receivers beside us have no certificate."""
    for url in (
        "http://hook/x",
        "http://hook.team-a.svc:8080/x",
        "http://hook.team-a.svc.cluster.local",
        "https://a.b/",
    ):
        assert webhook._host(url)


def test_a_secret_that_cannot_be_read_is_named() -> None:
    """Signing with another key than the receiver's fails there, where nobody looks for the reason."""
    with pytest.raises(ConfigError, match="NVILA_WEBHOOK_SECRET"):
        post("https://example.com/", "run.failed", {}, "whsec_no base64!")
