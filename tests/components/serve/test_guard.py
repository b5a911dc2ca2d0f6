"""The middleware in front of a small application that stands for vLLM: paths, key, CORS, bodies, what goes out."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.data.sampling import Sampling
from nvila.components.serve import guard as guard_module
from nvila.components.serve.facts import Facts
from nvila.components.serve.guard import PATHS, Guard
from nvila.components.serve.ports import free_port
from nvila.components.serve.told import Told

Message = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]
CHAT = "/v1/chat/completions"
BODY = b'{"model": "m", "messages": [{"role": "user", "content": "Why?"}]}'
JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Facts, "of", lambda folder: Facts(vocabulary=100, context=64, longest=8, sampling=Sampling(4)))
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


class Inner:
    """Stands for vLLM: keeps what it was asked, and answers with what it is told to."""

    def __init__(self, *pieces: bytes, status: int = 200, kind: str = "application/json") -> None:
        self.pieces, self.status, self.kind = pieces or (b'{"ok": 1}',), status, kind
        self.asked: list[tuple[Message, bytes]] = []
        self.released: asyncio.Event | None = None

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message.get("body", b"")
        self.asked.append((scope, body + message.get("body", b"")))
        if self.released:
            await self.released.wait()
        headers = [(b"content-type", self.kind.encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def made(inner: App, **settings: Any) -> Guard:
    return Guard(inner, Told(model_dir=Path("model"), settings=EndpointSettings(**settings)))


async def asked(
    guard: Guard,
    path: str = CHAT,
    pieces: tuple[bytes, ...] = (BODY,),
    *,
    method: str = "POST",
    headers: Mapping[str, str] = JSON,
    kind: str = "http",
    raw: bytes | None = None,
) -> list[Message]:
    """What goes out for one request, whose body comes in pieces."""
    sent: list[Message] = []
    left = list(pieces)

    async def receive() -> Message:
        if not left:
            return {"type": "http.disconnect"}
        piece = left.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(left)}

    async def send(message: Message) -> None:
        sent.append(message)

    lines = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "path": path, "raw_path": raw or path.encode(), "method": method, "headers": lines}
    await guard(scope, receive, send)
    return sent


def status(messages: list[Message]) -> int:
    return int(messages[0]["status"])


def said(messages: list[Message]) -> Any:
    return json.loads(b"".join(message.get("body", b"") for message in messages[1:]))


def header(messages: list[Message], name: str) -> str | None:
    return next((v.decode() for n, v in messages[0]["headers"] if n.decode().lower() == name), None)


@pytest.mark.parametrize(
    ("path", "method", "expected"),
    [
        *((path, method, 200) for path, methods in PATHS.items() for method in methods if not path.startswith("/v1/")),
        ("/v1/models", "GET", 200),
        (CHAT, "POST", 200),
        (CHAT, "GET", 405),
        ("/health", "HEAD", 405),
        ("/v1/models", "OPTIONS", 405),
        *((path, "POST", 404) for path in ("/invocations", "/tokenize", "/scale_elastic_ep", "/v1/embeddings", "")),
        *(
            (path, "GET", 404)
            for path in ("/docs", "/openapi.json", "/load", "//v1/models", "/v1/models/", "/V1/models")
        ),
        ("/v1/../docs", "GET", 404),
    ],
)
def test_only_what_is_named_is_served(path: str, method: str, expected: int) -> None:
    """Documents, tokenizer and switches of the server stood open to everyone."""
    inner = Inner()
    got = asyncio.run(asked(made(inner), path, method=method))
    assert status(got) == expected
    assert len(inner.asked) == (expected == 200)
    if expected != 200:
        assert said(got)["error"]["message"]
    if expected == 405:
        assert header(got, "allow")


def test_another_spelling_of_a_path_and_web_sockets_are_not_served() -> None:
    """A rule that looks at one spelling is gone around by another that the application takes for the same."""
    inner = Inner()
    assert status(asyncio.run(asked(made(inner), "/v1/models", method="GET", raw=b"/v1/%6dodels"))) == 404
    assert asyncio.run(asked(made(inner), CHAT, kind="websocket"))[0]["type"] == "websocket.close"
    assert not inner.asked
    assert status(asyncio.run(asked(made(inner), "/v1/models", method="GET", raw=b"/v1/models?a=b"))) == 200


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        (CHAT, {}, 401),
        (CHAT, {"Authorization": "Bearer secret"}, 200),
        (CHAT, {"Authorization": "bearer   secret "}, 200),
        (CHAT, {"Authorization": "Bearer wrong"}, 401),
        (CHAT, {"Authorization": "secret"}, 401),
        (CHAT, {"x-api-key": "secret"}, 401),
        ("/v1/messages/count_tokens", {"x-api-key": "secret"}, 200),
        ("/v1/messages/count_tokens", {"x-api-key": "wrong", "authorization": "Bearer secret"}, 401),
        ("/v1/models", {}, 401),
        ("/version", {}, 401),
        ("/docs", {}, 404),
        ("/health", {}, 200),
        ("/metrics", {}, 200),
    ],
)
def test_every_path_but_the_probes_asks_for_the_key(
    monkeypatch: pytest.MonkeyPatch, path: str, headers: dict[str, str], expected: int
) -> None:
    """vLLM's own check leaves paths open, and takes one spelling of the header."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    inner = Inner()
    method = PATHS.get(path, ("GET",))[0]
    got = asyncio.run(asked(made(inner), path, method=method, headers={**JSON, **headers}))
    assert status(got) == expected
    if expected == 401:
        assert header(got, "www-authenticate") == "Bearer" and "secret" not in json.dumps(said(got))
        assert ("type" in said(got)) == path.startswith("/v1/messages"), "each protocol's own form"
    elif expected == 200:
        assert dict(inner.asked[0][0]["headers"])[b"authorization"] == b"Bearer secret", "as vLLM reads it"


def test_without_a_key_nothing_is_asked() -> None:
    """A local endpoint that was started without a key must not refuse its user."""
    assert status(asyncio.run(asked(made(Inner()), "/v1/models", method="GET"))) == 200


def test_headers_of_clients_reach_no_cache_and_no_request_id() -> None:
    """Two requests of one id were taken for one another, an engine that is not there was chosen, and vLLM's own CORS
    answers every site."""
    inner = Inner()
    asyncio.run(
        asked(
            made(inner),
            headers={
                **JSON,
                "x-request-id": "1",
                "x-data-parallel-rank": "9",
                "origin": "http://evil",
                "user-agent": "u",
            },
        )
    )
    names = {name for name, _ in inner.asked[0][0]["headers"]}
    assert names == {b"content-type", b"content-length", b"user-agent"}
    assert json.loads(inner.asked[0][1])["max_tokens"] == 64, "what goes on is the judged body"


def test_cors_answers_the_sites_of_the_operator_only() -> None:
    """Browsers' pages could not ask, and without a list any page could."""
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    allowed = asyncio.run(asked(made(Inner(), origins=["https://a.example"]), method="OPTIONS", headers=preflight))
    assert status(allowed) == 200 and header(allowed, "access-control-allow-origin") == "https://a.example"
    other = {**preflight, "origin": "https://b.example"}
    refused = asyncio.run(asked(made(Inner(), origins=["https://a.example"]), method="OPTIONS", headers=other))
    assert status(refused) == 400 and header(refused, "access-control-allow-origin") is None
    answer = asyncio.run(asked(made(Inner()), headers={**JSON, **preflight}))
    assert status(answer) == 200 and header(answer, "access-control-allow-origin") is None


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_beyond_the_limit_is_refused_and_not_held(declared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """400 MB of body took 1.4 GB of memory: lengths are declared, or a body comes in pieces without end."""
    monkeypatch.setattr(guard_module, "DRAINED", 2)
    inner = Inner()
    gate = made(inner, max_body_mib=1)
    pieces = (b"x" * 2**18,) * 64
    headers = {**JSON, "content-length": str(2**24)} if declared else JSON
    got = asyncio.run(asked(gate, pieces=pieces, headers=headers))
    assert status(got) == 413 and "1 MiB" in said(got)["error"]["message"]
    assert not inner.asked


def test_who_asks_before_sending_is_answered_at_once() -> None:
    """A client that expects `100 Continue` would be told to send what is not wanted."""
    headers = {**JSON, "content-length": "9" * 5000, "expect": "100-continue"}
    assert status(asyncio.run(asked(made(Inner()), pieces=(), headers=headers))) == 413


@pytest.mark.parametrize(
    ("headers", "body", "expected"),
    [
        ({}, BODY, 415),
        ({"content-type": "text/plain"}, BODY, 415),
        ({"content-type": "application/json; charset=utf-8"}, BODY, 200),
        ({**JSON, "content-encoding": "gzip"}, BODY, 415),
        (JSON, b"", 400),
        (JSON, b"{", 400),
    ],
)
def test_what_is_not_json_is_refused(headers: dict[str, str], body: bytes, expected: int) -> None:
    """Such bodies were errors of the server, or were guessed at."""
    got = asyncio.run(asked(made(Inner()), pieces=(body[:10], body[10:]), headers=headers))
    assert status(got) == expected
    if expected != 200:
        assert set(said(got)["error"]) == {"message", "type", "param", "code"}


def test_one_request_too_many_is_told_to_come_again() -> None:
    """Without a limit all wait, and those who wait hold memory."""
    inner = Inner()

    async def both() -> tuple[list[Message], list[Message], list[Message]]:
        inner.released = asyncio.Event()
        gate = made(inner, max_requests=1)
        first = asyncio.create_task(asked(gate))
        while not inner.asked:
            await asyncio.sleep(0.001)
        second = await asked(gate)
        inner.released.set()
        return await first, second, await asked(gate, "/health", method="GET")

    first, second, probe = asyncio.run(both())
    assert status(first) == status(probe) == 200
    assert status(second) == 429 and header(second, "retry-after")


def test_what_was_held_and_counted_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is refused, too large or broken off must not take the place of a later one for good."""
    monkeypatch.setattr(guard_module, "MOST_BODIES", 1)
    gate = made(Inner(), max_requests=1, max_body_mib=1)
    large = b'{"messages": [{"role": "user", "content": "a"}], "user": "' + b"x" * 2**19

    async def go() -> list[int]:
        got = []
        for pieces in ((large, b'"}'), (large, b"{"), (large * 3,), (large, b'"}')) * 2:
            got.append(status(await asked(gate, pieces=pieces)))
        assert await asked(gate, pieces=()) == []  # gone before its first byte
        return [*got, status(await asked(gate, pieces=(large, b'"}')))]

    assert asyncio.run(go()) == [200, 400, 413, 200] * 2 + [200]


def test_nothing_goes_out_before_the_first_byte_of_an_answer() -> None:
    """Headers that are out early forbid a proxy to ask another server when this one dies."""
    gone: list[str] = []

    async def inner(scope: Message, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        assert not gone
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Message) -> None:
        gone.append(message["type"].removeprefix("http.response."))

    scope = {"type": "http", "path": "/metrics", "method": "GET", "headers": []}
    asyncio.run(made(inner)(scope, None, send))  # type: ignore[arg-type]
    assert gone == ["start", "body", "body"]


@pytest.mark.parametrize(
    ("inner", "expected", "words"),
    [
        (Inner(b'{"error": "Unauthorized"}', status=401), 401, "Unauthorized"),
        (Inner(b'{"detail": "Not ', b'Found"}', status=404), 404, "Not Found"),
        (Inner(b"Internal Server Error", status=500, kind="text/plain"), 500, "Internal Server Error"),
        (Inner(b'{"error": {"message": "too long", "type": "x", "code": 400}}', status=400), 400, "too long"),
        (Inner(b'{"error": {"message": "EngineCore encountered an issue.", "code": 500}}', status=500), 503, "again"),
        (Inner(b'data: {"error": {"message": "no", "code": 500}}\n\n', kind="text/event-stream"), 500, "no"),
    ],
)
def test_errors_have_one_form(inner: Inner, expected: int, words: str) -> None:
    """Clients' libraries raise by this form; an engine that is away is no fault of the request."""
    got = asyncio.run(asked(made(inner)))
    assert status(got) == expected and words in said(got)["error"]["message"]
    assert (header(got, "retry-after") is not None) == (expected == 503)


@pytest.fixture
def served() -> Iterator[Callable[[App], int]]:
    """A real HTTP server with the middleware in front of an application; gives its port."""
    import uvicorn

    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def serve(inner: App) -> int:
        port = free_port("127.0.0.1")
        server = uvicorn.Server(uvicorn.Config(made(inner), port=port, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return port

    yield serve
    for server, thread in servers:
        server.should_exit = True
        thread.join()


def raw(port: int, body: bytes = BODY) -> bytes:
    """Everything that comes back on one connection."""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + body)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_broken_stream_ends_without_its_last_chunk(served: Callable[[App], int]) -> None:
    """vLLM ends it with [DONE] and a last chunk: half an answer looked whole."""
    events = (b'data: {"choices": []}\n\n', b'data: {"error": {"message": "gone"}}\n\n', b"data: [DONE]\n\n")
    broken = raw(served(Inner(*events, kind="text/event-stream")))
    assert b'"gone"' in broken and b"[DONE]" not in broken and not broken.endswith(b"0\r\n\r\n")
    whole = raw(served(Inner(events[0], events[2], kind="text/event-stream")))
    assert b"[DONE]" in whole and whole.endswith(b"0\r\n\r\n")
