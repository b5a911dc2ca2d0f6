import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from nvila.components.serve.guard import RequireKey


def _status(path: str, headers: list[tuple[bytes, bytes]]) -> int:
    sent: list[MutableMapping[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request"}

    asyncio.run(RequireKey(app)({"type": "http", "path": path, "headers": headers}, receive, send))
    return int(sent[0]["status"])


@pytest.mark.parametrize(
    ("path", "authorization", "status"),
    [
        ("/v1/chat/completions", None, 401),
        ("/invocations", None, 401),
        ("/tokenize", b"Bearer wrong", 401),
        ("/invocations", b"Bearer secret", 200),
        ("/health", None, 200),
        ("//health", None, 401),
    ],
)
def test_every_path_but_the_probes_asks_for_the_key(
    monkeypatch: pytest.MonkeyPatch, path: str, authorization: bytes | None, status: int
) -> None:
    """Prevents a path that vLLM's own check leaves open from answering without the key."""
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert _status(path, [(b"Authorization", authorization)] if authorization else []) == status


def test_without_a_key_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a local endpoint that was started without a key from refusing its user."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert _status("/v1/models", []) == 200
