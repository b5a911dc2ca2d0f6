"""Whether a Service leads to pods that take requests; small servers stand behind it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from nvila.infra.controller import reach
from nvila.infra.controller.reach import reaches


@pytest.fixture
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of a server that says this to everybody and leaves."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with closing(connection):
                    connection.recv(1 << 16)
                    connection.sendall(request.param)

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


def service(address: str = "127.0.0.1") -> dict[str, object]:
    return {"spec": {"clusterIP": address}}


@pytest.mark.parametrize(
    ("port", "leads"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", False),
        (b"HTTP/1.1 200", False),
        (b"", False),
        (b"x" * 10_000, False),
        (b"SSH-2.0\r\n", False),
    ],
    indirect=["port"],
)
def test_only_a_healthy_answer_counts(port: int, leads: bool) -> None:
    """Whatever else answers there is none of our pods that takes requests."""
    assert reaches(service(), port) == leads


def test_nobody_there_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Service without an address yet, or whose packets are dropped, must not end the round, nor hold it up."""
    monkeypatch.setattr(reach, "SECONDS", 0.2)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        assert not reaches(service(), port)
    assert not reaches(service(), port)
    assert not reaches({"spec": {}}) and not reaches(None)
