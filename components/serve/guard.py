"""ASGI middleware of the server: which paths there are, who may ask, how much at a time; `requests` judges bodies.

It stands in front of everything that vLLM serves: what it does not name is not there. It runs in vLLM's API server, in
pods as on this machine, so no rule depends on what stands in front. `answers` sees to what goes out.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.model.text.timetokens import times_of
from nvila.components.serve.answers import Answer, BrokenStreamError, Message, Send
from nvila.components.serve.facts import Facts
from nvila.components.serve.media import Allowance, begin
from nvila.components.serve.parameters import Bounds
from nvila.components.serve.refusal import ANTHROPIC, Refusal
from nvila.components.serve.requests import JUDGES, Judged, is_quick, judge
from nvila.components.serve.told import Told

Scope = Message
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PATHS: Mapping[str, tuple[str, ...]] = {
    "/health": ("GET",),
    "/ping": ("GET", "POST"),
    "/metrics": ("GET",),
    "/version": ("GET",),
    "/v1/models": ("GET",),
    **dict.fromkeys(JUDGES, ("POST",)),
}
"""What is served, and by which methods."""
OPEN_PATHS = frozenset({"/health", "/ping", "/metrics"})
"""Need no key: probes, and the counters that a cluster's monitoring reads; no request's content is in them."""
PASSED_HEADERS = frozenset({b"host", b"user-agent", b"accept", b"traceparent", b"tracestate"})
"""The others end here: vLLM takes request ids, priorities, sessions and ranks of engines from headers, and answers CORS
for everyone."""
MOST_BODIES = 8
"""Largest bodies that may be in work at a time, in sum; the next one is told to come again."""
DRAINED, DRAIN_SECONDS = 4, 10
"""Largest bodies, and time, for which what a refused client still sends is read and thrown away."""


TIMED = frozenset({"/v1/chat/completions", "/v1/messages"})
"""What is asked of clips, and says times."""


class Guard:
    """Passes on what is allowed, in the form that vLLM understands, and refuses all else with a reason."""

    def __init__(self, app: App, told: Told | None = None) -> None:
        told = told or Told.read()  # vLLM makes the middleware, with no arguments of ours
        self._gate = _Gate(app, told)
        self._entry: App = self._gate
        if told.settings.origins:
            from starlette.middleware.cors import CORSMiddleware

            self._entry = CORSMiddleware(
                self._gate,  # type: ignore[arg-type]
                allow_origins=told.settings.origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "lifespan":
            await self._gate.app(scope, receive, send)
        else:
            await self._entry(scope, receive, send)


class _Gate:
    def __init__(self, app: App, told: Told) -> None:
        self.app = app
        self._settings: EndpointSettings = told.settings
        self._bounds = None if told.model_dir is None else Bounds(Facts.of(told.model_dir), told.settings)
        key = Environment.read().vllm_key
        self._key = None if key is None else key.get_secret_value().encode()
        self._most = told.settings.max_body_mib * 2**20
        self._running = self._held = 0
        # Of its own: in the common one a judgement would wait for the decoding of other people's clips.
        self._judges = ThreadPoolExecutor(2, thread_name_prefix="judge")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        answer, body = Answer(send, path), _Body(receive)
        counted = False
        try:
            _require_served(scope)
            self._require_key(scope)
            if path not in JUDGES:
                return await self.app(_inner(scope, self._key, None), receive, answer)
            self._require_place()
            content = await self._read(scope, body)
            self._require_place()  # who sends slowly takes none
            self._running, counted = self._running + 1, True
            judged = await self._judged(path, content)
            begin(allowance := Allowance(self._settings, judged.sampling))
            if self._bounds and path in TIMED:
                answer.times = partial(times_of, self._bounds.facts.time_tokens, allowance.clips)
            inner, again = _inner(scope, self._key, len(judged.body)), _again(judged.body, receive)
            del content, judged  # not held while it is answered
            await self.app(inner, again, answer)
        except Refusal as refusal:
            if not any(name.lower() == b"expect" for name, _ in scope["headers"]):  # that client waits for our word
                await body.drain(DRAINED * self._most)
            await answer.refuse(refusal)
        except _GoneError:
            return
        except BrokenStreamError:
            if not answer.complete:
                raise
        finally:
            self._running -= counted
            self._held -= body.size

    def _require_place(self) -> None:
        if self._running >= self._settings.max_requests:
            raise Refusal(
                f"{self._running} requests are being answered, the most on this server; come again",
                status=429,
                code="too_many_requests",
            )

    async def _judged(self, path: str, body: bytes) -> Judged:
        if self._bounds is None:
            raise Refusal("the server was not told which model it serves", status=503, code="unavailable")
        if is_quick(body):  # a thread would take longer to begin than this to end
            return judge(path, body, self._bounds)
        return await asyncio.get_running_loop().run_in_executor(self._judges, judge, path, body, self._bounds)

    def _require_key(self, scope: Scope) -> None:
        path = scope["path"]
        if self._key is None or path in OPEN_PATHS:
            return
        given = [value.strip() for name, value in scope["headers"] if name.lower() == b"authorization"]
        if path.startswith(ANTHROPIC):
            given += [b"bearer " + value.strip() for name, value in scope["headers"] if name.lower() == b"x-api-key"]
        fits = [_is_key(value, self._key) for value in given]
        if not fits or not all(fits):
            header = "x-api-key: <key>" if path.startswith(ANTHROPIC) else "Authorization: Bearer <key>"
            raise Refusal(
                f"{'the key is not the right one' if given else 'a key is needed'}: send the header {header}",
                status=401,
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    async def _read(self, scope: Scope, body: _Body) -> bytes:
        """The body, of which never more than the limit is held.

        Raises:
            Refusal: too large, too slow, not JSON by its headers, or too much is being read already.
        """
        headers = {name.lower(): value for name, value in scope["headers"]}
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            said = kind.decode("latin-1")[:80] or "nothing"
            raise Refusal(f"the body is of type application/json, not {said}", status=415, code="wrong_media_type")
        if headers.get(b"content-encoding", b"").strip().lower() not in (b"", b"identity"):
            raise Refusal("the body comes uncompressed", status=415, code="wrong_media_type")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._most:
            raise self._too_large()
        pieces: list[bytes] = []
        try:
            async with asyncio.timeout(self._settings.request_seconds):
                while body.more:
                    pieces.append(piece := await body.piece())
                    self._held += len(piece)
                    if body.size > self._most:
                        pieces.clear()
                        raise self._too_large()
                    if self._held > MOST_BODIES * self._most:
                        pieces.clear()
                        raise Refusal(
                            "too many large requests at a time; come again", status=429, code="too_many_requests"
                        )
        except TimeoutError:
            raise Refusal("the body did not come in time", status=408, code="too_slow") from None
        return b"".join(pieces)

    def _too_large(self) -> Refusal:
        most = self._settings.max_body_mib
        return Refusal(
            f"the body has more than {most} MiB; send fewer or smaller pictures and clips",
            status=413,
            code="request_too_large",
            headers={"connection": "close"},
        )


class _Body:
    """The body of a request as it comes."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.size = 0
        """Bytes so far that were not thrown away."""
        self.more = True
        """Whether it may go on."""

    async def piece(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        piece, self.more = bytes(message.get("body", b"")), bool(message.get("more_body"))
        self.size += len(piece)
        return piece

    async def drain(self, most: int) -> None:
        """Read on and hold nothing: a client that is still sending would not hear the answer."""
        size, read = self.size, 0
        with contextlib.suppress(TimeoutError, _GoneError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self.more and read <= most:
                    read += len(await self.piece())
        self.size = size


class _GoneError(Exception):
    """The client has closed the connection."""


def _require_served(scope: Scope) -> None:
    """Only paths as they are written in `PATHS`: no other spelling reaches a rule that is meant for it."""
    path, method = scope["path"], scope["method"]
    raw = scope.get("raw_path")
    if path not in PATHS or (raw is not None and bytes(raw).partition(b"?")[0] != path.encode()):
        served = ", ".join(PATHS)
        raise Refusal(f"{path[:200]!r} is not served; served are {served}", status=404, code="unknown_path")
    if method not in (allowed := PATHS[path]):
        raise Refusal(
            f"{path} is asked by {' or '.join(allowed)}, not {method}",
            status=405,
            code="method_not_allowed",
            headers={"allow": ", ".join(allowed)},
        )


def _is_key(authorization: bytes, key: bytes) -> bool:
    scheme, _, given = authorization.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key)


def _inner(scope: Scope, key: bytes | None, length: int | None) -> Scope:
    """The scope as vLLM gets it; it checks the key once more, in one spelling."""
    headers = [(name, value) for name, value in scope["headers"] if name.lower() in PASSED_HEADERS]
    if key is not None:
        headers.append((b"authorization", b"Bearer " + key))
    if length is not None:
        headers += [(b"content-type", b"application/json"), (b"content-length", str(length).encode())]
    return {**scope, "headers": headers}


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the judged body first, then what the client does."""
    left: list[bytes] = [body]

    async def give() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return give
