"""ASGI middleware of the server: with an API key set, every path but the probes asks for it.

vLLM's own check covers some path prefixes only; `/invocations` would answer anyone.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from nvila.components.contracts.environment import Environment

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/metrics"})


class RequireKey:
    """Answers 401 to a request without `Authorization: Bearer <key>`, and closes a web socket without it."""

    def __init__(self, app: App) -> None:
        self._app = app
        key = Environment.read().vllm_key  # vLLM makes the middleware, with no arguments of ours
        self._key = None if key is None else key.get_secret_value()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if self._key is None or scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "an API key is required"}'})

    def _has_key(self, scope: Scope) -> bool:
        given = next((value for name, value in scope.get("headers", []) if name.lower() == b"authorization"), b"")
        return hmac.compare_digest(given, f"Bearer {self._key}".encode())
