"""Pinned prompts that are asked in the background: small servers play pods."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import NvilaError, Unreachable
from nvila.components.contracts.modelrollout import PINNED_FILE
from nvila.components.rollout.policy import Asked
from nvila.infra.controller import ask
from nvila.infra.controller.ask import MOST_FILES, Asking
from nvila.infra.controller.seen import Registered

KEY = "a-key"


def line(number: int) -> bytes:
    """Its question names it; the evaluated model said `blue`, and the truth is `red`."""
    body = {"messages": [{"role": "user", "content": f"question {number}"}], "max_tokens": 8, "logprobs": True}
    return json.dumps({"id": str(number), "body": body, "expected": "blue", "answer": "red"}).encode() + b"\n"


PINNED = b"".join(map(line, range(6)))
VERSION = Registered("m", "2", "d", hashlib.sha256(PINNED).hexdigest())


class Files:
    """Of a registry: gives this, or raises it."""

    def __init__(self, content: bytes | NvilaError = PINNED) -> None:
        self.content, self.asked = content, 0

    def artifact(self, registered: Registered, name: str, partial: Path, most_bytes: int) -> str:
        assert name == PINNED_FILE and not partial.exists()
        self.asked += 1
        if isinstance(self.content, NvilaError):
            raise self.content
        partial.write_bytes(self.content)
        return hashlib.sha256(self.content).hexdigest()


def said(text: str, logprob: float = -0.1) -> bytes:
    logprobs = {"content": [{"token": "x", "logprob": logprob}]}
    return json.dumps({"choices": [{"message": {"content": text}, "logprobs": logprobs}]}).encode()


Reply = Callable[[dict[str, Any]], tuple[int, bytes]]


class Pods:
    """Two pods (127.0.0.2 and 127.0.0.3) at the same port, and what they were asked."""

    def __init__(self, reply: Reply) -> None:
        self.asked: list[tuple[str, str, str, str]] = []
        pods = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                at, question = self.server.server_address[0], body["messages"][0]["content"]
                pods.asked.append((str(at), self.headers["x-nvila-version"], body["model"], question))
                assert self.headers["Authorization"] == f"Bearer {KEY}" and self.path == "/v1/chat/completions"
                status, content = reply(body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                return

        first = ThreadingHTTPServer(("127.0.0.2", 0), Handler)
        self.port = first.server_port
        self.servers = [first, ThreadingHTTPServer(("127.0.0.3", self.port), Handler)]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    addresses = ("127.0.0.2", "127.0.0.3")

    def end(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()


@pytest.fixture
def played() -> Iterator[Callable[[Reply], Pods]]:
    made: list[Pods] = []

    def play(reply: Reply) -> Pods:
        made.append(Pods(reply))
        return made[-1]

    yield play
    for pods in made:
        pods.end()


def begin(asking: Asking, pods: Pods, files: Files, key: str = "k", count: int = 4, of: Registered = VERSION) -> None:
    asking.begin(key, of, "1", pods.addresses, count, files, KEY)  # type: ignore[arg-type]


def until(there: Callable[[], Any]) -> Any:
    """What it comes to, once it comes to anything."""
    deadline = time.monotonic() + 60
    while not (found := there()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def answered(asking: Asking, key: str = "k") -> Asked:
    found = until(lambda: (asking.answer(key),) if asking.answer(key) is not None else None)[0]
    assert isinstance(found, Asked)
    return found


def test_the_first_prompts_are_asked_of_all_pods_in_turn(played: Callable[[Reply], Pods]) -> None:
    """One pod that answers otherwise, or another version than was meant, decides about the promotion."""
    pods, files = played(lambda body: (200, said("Blue."))), Files()
    asking = Asking(pods.port)
    begin(asking, pods, files)
    begin(asking, pods, files)
    assert answered(asking) == Asked(asked=4, agreed=4)
    begin(asking, pods, files)
    assert pods.asked == [(f"127.0.0.{2 + n % 2}", "1", "m", f"question {n}") for n in range(4)]
    begin(asking, pods, files, "of the champion")
    assert answered(asking, "of the champion").asked == 4 and files.asked == 1


def test_each_answer_is_judged(played: Callable[[Reply], Pods]) -> None:
    """A server that fails, or says nonsense of any kind, is not one that agrees."""
    replies = [
        (200, said("blue")),
        (200, said("red")),
        (200, said("blue", -9999.0)),
        (503, b"busy"),
        (200, b"<html>"),
        (200, b'{"choices": [{"message": 3}]}'),
    ]
    pods = played(lambda body: replies[int(body["messages"][0]["content"].split()[1])])
    asking = Asking(pods.port)
    begin(asking, pods, Files(), count=64)
    assert answered(asking) == Asked(asked=6, errors=3, agreed=2, right=1, without_value=1)


def test_an_answer_without_end_is_an_error(played: Callable[[Reply], Pods], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server gone mad would fill the controller's memory, and end the rollouts of all other models."""
    monkeypatch.setattr(ask.server, "_MOST_BYTES", 1000)
    pods = played(lambda body: (200, said("blue" * 1000)))
    asking = Asking(pods.port)
    begin(asking, pods, Files(), count=1)
    assert answered(asking) == Asked(asked=1, errors=1)


def test_a_pod_that_is_gone_is_an_error() -> None:
    """Its requests would be asked again until it is back, and the pods' deadline pass."""
    asking = Asking(1)
    asking.begin("k", VERSION, "1", ["127.0.0.9"], 2, Files(), "")  # type: ignore[arg-type]
    assert answered(asking) == Asked(asked=2, errors=2)
    asking.begin("nobody", VERSION, "1", [], 2, Files(), "")  # type: ignore[arg-type]
    assert asking.answer("nobody") is None


@pytest.mark.parametrize(
    ("content", "of"),
    [
        (PINNED + b" ", VERSION),
        (b"{}\n", Registered("m", "2", pinned=hashlib.sha256(b"{}\n").hexdigest())),
        (b"[", Registered("m", "2", pinned=hashlib.sha256(b"[").hexdigest())),
        (PINNED, Registered("m", "2")),
        (PINNED, Registered("m", "2", pinned="../../etc/passwd")),
        (NvilaError("no such file"), VERSION),
    ],
)
def test_prompts_that_cannot_be_had_are_none(
    played: Callable[[Reply], Pods], content: bytes | NvilaError, of: Registered, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others than were evaluated would decide, or the version wait for ever: the policy takes none for too few."""
    pods = played(lambda body: (200, said("blue")))
    asking = Asking(pods.port)
    begin(asking, pods, Files(content), of=of)
    assert answered(asking) == Asked() and not pods.asked
    assert "cannot be asked" in capsys.readouterr().out


def test_a_registry_that_is_away_is_asked_later(played: Callable[[Reply], Pods]) -> None:
    """A minute without MLflow would reject a good version."""
    pods, files = played(lambda body: (200, said("blue"))), Files(Unreachable("away"))
    asking = Asking(pods.port)
    begin(asking, pods, files)
    until(lambda: files.asked == 1 and not asking._under_way)
    assert asking.answer("k") is None
    files.content = PINNED
    begin(asking, pods, files)
    assert answered(asking).agreed == 4


def test_single_prompts_come_round(played: Callable[[Reply], Pods]) -> None:
    """The same one each time measures a cache."""
    pods, files = played(lambda body: (200, said("blue"))), Files()
    asking = Asking(pods.port)
    while len(pods.asked) < 8:
        asking.one("k", VERSION, "1", pods.addresses, files, KEY)  # type: ignore[arg-type]
        time.sleep(0.01)
    assert [one[3] for one in pods.asked[:8]] == [f"question {n % 6}" for n in range(8)]
    assert {one[0] for one in pods.asked} == set(pods.addresses)


def test_the_disk_holds_a_few_files(played: Callable[[Reply], Pods]) -> None:
    """Each promotion would leave 32 MiB behind."""
    pods = played(lambda body: (200, said("blue")))
    asking = Asking(pods.port)
    for number in range(MOST_FILES + 3):
        content = line(number)
        of = Registered("m", str(number), pinned=hashlib.sha256(content).hexdigest())
        begin(asking, pods, Files(content), f"k{number}", of=of)
        assert answered(asking, f"k{number}").agreed == 1
        assert len(list(asking._prompts.folder.iterdir())) <= MOST_FILES
