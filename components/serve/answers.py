"""What goes out of the server: nothing before an answer's first byte, errors in the protocol's form, broken streams.

A client, or a proxy in front, can send a request again elsewhere as long as no byte of the answer has come.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from nvila.components.model.text.timetokens import Times
from nvila.components.serve.refusal import Refusal, error_body
from nvila.components.serve.times import Told

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

MOST_BYTES = 2**16
"""Of an error's body; a longer one goes on as it is."""
DEAD = "EngineCore encountered an issue"
"""How vLLM says that its engine has ended."""
_ERRORS = (b'data: {"error"', b"event: error")
"""Beginnings of the event with which vLLM tells that a stream is broken; `data: [DONE]` follows all the same."""


class BrokenStreamError(Exception):
    """Raised when an answer cannot be finished, so that the server closes the connection without its last chunk."""


class Answer:
    """Takes the messages of one answer and passes them on."""

    def __init__(self, send: Send, path: str) -> None:
        self._send, self._path = send, path
        self.times: Callable[[], Times | None] = lambda: None
        """What times are in the answer, once its media are known."""
        self._told: Told | None = None
        self._start: Message | None = None
        self._held = b""
        self._last = b"\n\n"
        self.begun = False
        """Whether something of it has gone out."""
        self.complete = False
        """Whether it was an answer of our own, which is whole."""

    async def __call__(self, message: Message) -> None:
        """The `send` of the application.

        Raises:
            BrokenStreamError: the stream told of a fault; its event has gone out.
        """
        if message["type"] == "http.response.start":
            self._start = message
            if self._start["status"] < 400 and (times := self.times()):
                self._told = Told(times)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._start is not None and self._start["status"] >= 400:
            await self._error(message)
        elif self._is_stream():
            if self._told and message.get("body"):
                message = {**message, "body": self._told.events(bytes(message["body"]))}
            await self._event(message)
        elif self._told:
            await self._whole(message, self._told)
        elif message.get("body") or not message.get("more_body"):
            await self._pass(message)

    async def refuse(self, refusal: Refusal) -> None:
        """An answer of our own."""
        body = refusal.body(self._path)
        headers = {"content-type": "application/json", "content-length": str(len(body))} | refusal.headers
        await self._send(
            {
                "type": "http.response.start",
                "status": refusal.status,
                "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            }
        )
        self.begun = True
        await self._send({"type": "http.response.body", "body": body})
        self.complete = True

    async def _whole(self, message: Message, told: Told) -> None:
        """Held until it is whole, and rewritten."""
        assert self._start is not None
        self._held += bytes(message.get("body", b""))
        if message.get("more_body"):
            return
        body = told.whole(self._held)
        kept = [header for header in self._start.get("headers", ()) if header[0].lower() != b"content-length"]
        self._start = {**self._start, "headers": [*kept, (b"content-length", str(len(body)).encode())]}
        await self._pass({"type": "http.response.body", "body": body})

    def _is_stream(self) -> bool:
        return b"text/event-stream" in _header((self._start or {}).get("headers", ()), b"content-type")

    async def _pass(self, message: Message) -> None:
        if not self.begun and self._start is not None:
            await self._send(self._start)
            self.begun = True
        await self._send(message)

    async def _event(self, message: Message) -> None:
        body = bytes(message.get("body", b""))
        fault = next((at for at in (_begins(self._last, body, error) for error in _ERRORS) if at is not None), None)
        if fault is None:
            if body or not message.get("more_body"):
                await self._pass(message)
            self._last = (self._last + body)[-2:]
            return
        end = body.find(b"\n\n", fault)
        event = body[: len(body) if end < 0 else end + 2]
        if not self.begun:
            return await self._refuse_instead(event)
        await self._pass({"type": "http.response.body", "body": event, "more_body": True})
        raise BrokenStreamError("the engine could not finish a streamed answer; its connection is closed")

    async def _refuse_instead(self, event: bytes) -> None:
        """No byte has gone out yet: the fault is an error like any other."""
        code, message = _said(event.partition(b"data: ")[2])
        await self.refuse(_fault(code or 500, message))
        raise BrokenStreamError("the engine could not begin a streamed answer")

    async def _error(self, message: Message) -> None:
        """Held until it is whole; what is not in the protocol's form is brought into it."""
        assert self._start is not None
        self._held += bytes(message.get("body", b""))
        if message.get("more_body") and len(self._held) <= MOST_BYTES:
            return
        status = self._start["status"]
        code, said = _said(self._held)
        if message.get("more_body"):
            await self._pass({**message, "body": self._held})
            self._start = {"status": 200, "headers": []}
        elif status >= 500 and (DEAD in said or status == 503):
            await self.refuse(_fault(500, DEAD))
        elif code is not None or not self._path.startswith("/v1/"):
            await self._pass({**message, "body": self._held})
        else:
            body = error_body(self._path, status, said or f"the server answered {status}")
            kept = [
                h for h in self._start.get("headers", ()) if h[0].lower() not in (b"content-length", b"content-type")
            ]
            kept += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            self._start = {**self._start, "headers": kept}
            await self._pass({"type": "http.response.body", "body": body})


def _fault(status: int, message: str) -> Refusal:
    if DEAD in message:
        return Refusal(
            "the engine has ended and is started again; come again in a few seconds", status=503, code="unavailable"
        )
    return Refusal(message or "the server could not answer", status=status, code="fault")


def _begins(before: bytes, body: bytes, event: bytes) -> int | None:
    """Where an event begins in a piece of a stream that follows `before`."""
    if body.startswith(event) and before.endswith(b"\n\n"):
        return 0
    at = body.find(b"\n\n" + event)
    return None if at < 0 else at + 2


def _said(body: bytes) -> tuple[int | None, str]:
    """Code and message of an error in a form that the protocols know, else None and what text there is."""
    try:
        content = json.loads(body)
    except ValueError:
        return None, body.decode(errors="replace")[:500]
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        code = error.get("code")
        return code if isinstance(code, int) and 400 <= code < 600 else 500, error["message"]
    said = error or (content.get("detail") if isinstance(content, dict) else None) or content
    return None, said if isinstance(said, str) else json.dumps(said)[:500]


def _header(headers: Any, name: bytes) -> bytes:
    return next((bytes(value) for key, value in headers if key.lower() == name), b"")
