"""Clients of an endpoint, for tests and benchmarks: a mix of requests, a steady client, and what came of each."""

from __future__ import annotations

import base64
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Request:
    """A POST and whether it has to be answered or refused."""

    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    good: bool = True


@dataclass(frozen=True)
class Reply:
    """What came of a request."""

    status: int
    """0 where the connection broke before one."""
    seconds: float
    body: bytes
    whole: bool = True
    """Whether the answer ended as its form says: a stream with `[DONE]` and its last chunk."""
    error: str = ""
    began: float = 0.0
    """When it was sent, as of `time.monotonic`."""

    @property
    def answered(self) -> bool:
        """200, to its end."""
        return self.status == 200 and self.whole


def send(url: str, request: Request, timeout_seconds: float = 120.0, key: str = "") -> Reply:
    """One request on a connection of its own."""
    parts, began = urlsplit(url), time.monotonic()
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_seconds)
    status, body = 0, b""
    try:
        headers = request.headers | ({"Authorization": f"Bearer {key}"} if key else {})
        connection.request("POST", request.path, request.body, headers)
        answer = connection.getresponse()
        status = answer.status
        stream = "event-stream" in (answer.getheader("content-type") or "")
        while piece := answer.read(65_536):
            body += piece
    except (OSError, HTTPException) as error:
        body += getattr(error, "partial", b"")
        return Reply(status, time.monotonic() - began, body, whole=False, error=repr(error), began=began)
    finally:
        connection.close()
    whole = not stream or body.rstrip().endswith(b"[DONE]")
    return Reply(status, time.monotonic() - began, body, whole, began=began)


def chat(model: str, *content: dict[str, Any] | str, **options: Any) -> Request:
    """A question of texts and media parts to `/v1/chat/completions`, greedy and short where nothing else is said."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 4, "temperature": 0}
    return Request("/v1/chat/completions", json.dumps(body | options).encode())


def part(path: Path) -> dict[str, Any]:
    """A file as a media part: a clip by its suffix, else a picture."""
    kind, form = ("video", "mp4") if path.suffix == ".mp4" else ("image", "png")
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{kind}/{form};base64,{data}"}}


def mixed(seed: int, count: int, model: str, media: list[Path], malformed: Iterable[Request] = ()) -> list[Request]:
    """Questions with and without media, streams, completions; one in ten is the next of `malformed`, if any."""
    draw, bad = random.Random(seed), iter(malformed)
    made = []
    for number in range(count):
        wrong = next(bad, None) if number % 10 == 9 else None
        made.append(wrong or _good(draw, model, media))
    return made


def _good(draw: random.Random, model: str, media: list[Path]) -> Request:
    text = " ".join(draw.choice(("which", "digit", "is", "shown", "third", "what", "colour")) for _ in range(6))
    options: dict[str, Any] = {"max_tokens": draw.randint(1, 6), "stream": draw.random() < 0.4}
    if draw.random() < 0.3:
        options |= {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 0.5, "seed": draw.randrange(1000)}
    if draw.random() < 0.15:
        body = {"model": model, "prompt": text, **options}
        return Request("/v1/completions", json.dumps(body).encode())
    chosen = [part(path) for path in draw.choices(media, k=draw.choice((0, 1, 1, 2)))]
    return chat(model, *chosen, text, **options)


def run(url: str, requests: list[Request], clients: int, key: str = "") -> list[Reply]:
    """All of them, so many at a time."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda request: send(url, request, key=key), requests))


def told(replies: Iterable[Reply]) -> Counter[int]:
    """How many of each status; 0 for what broke off."""
    return Counter(reply.status if reply.whole else 0 for reply in replies)


class Steady:
    """A client that asks on and on while the context is open, several at a time."""

    def __init__(self, url: str, requests: Iterator[Request], clients: int = 2, pause_seconds: float = 0.05) -> None:
        self.url, self.requests, self.pause = url, requests, pause_seconds
        self.replies: list[Reply] = []
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]

    def _ask(self) -> None:
        while not self._stop.wait(self.pause):
            with self._lock:
                request = next(self.requests)
            reply = send(self.url, request)
            self.replies.append(reply)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def lost(self) -> list[Reply]:
        """What was not answered to its end."""
        return [reply for reply in self.replies if not reply.answered]
