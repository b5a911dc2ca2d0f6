"""Asks serving pods what their requests have come to: many at once, each for two seconds; only whole answers count."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import TypeVar

from nvila.components.contracts.counters import Counters
from nvila.components.contracts.modelrollout import METRICS_PORT
from nvila.infra.controller.seen import Pod, Running

SECONDS = 2.0
MOST_BYTES = 1 << 20
"""Of an answer."""
MOST_AT_ONCE = 64
PREFIX = "nvila_endpoint_"
_WHOLE = ("requests", "errors", "first_tokens", "tokens", "restarts")
_SECONDS = ("first_token_seconds", "token_seconds")
_LINE = re.compile(
    rf"^{PREFIX}([a-z_]+)_total(?:\{{([^}}]*)\}})? ([0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?)$", re.MULTILINE
)
_VERSION = re.compile(r'(?:^|,)version="([^"]*)"')
_ANSWER = re.compile(rb"HTTP/1\.[01] 200 [^\r\n]*\r\n(?:[^\r\n]+\r\n)*?\r\n")

K = TypeVar("K", bound=Hashable)


def scrape(running: Mapping[tuple[K, str], Running], port: int = METRICS_PORT) -> dict[tuple[K, str], Running]:
    """The same pods with what each has counted, and the restarts of the server in it.

    Args:
        running: by the model, and the version that its pods have to say they are: an address may be another pod's by
            now.
        port: of the pods.
    """
    return asyncio.run(_scrape(running, port))


async def _scrape(running: Mapping[tuple[K, str], Running], port: int) -> dict[tuple[K, str], Running]:
    room = asyncio.Semaphore(MOST_AT_ONCE)

    async def read(pod: Pod, version: str) -> Pod:
        async with room:
            return _with(pod, await _get(pod.address, port), version) if pod.address else pod

    asked = {key: asyncio.gather(*(read(pod, key[1]) for pod in one.pods)) for key, one in running.items()}
    return {key: replace(running[key], pods=tuple(await pods)) for key, pods in asked.items()}


async def _get(address: str, port: int) -> str:
    """What a pod says; nothing where it does not say all of it within bounds."""
    answer = b""
    try:
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                writer.write(f"GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
                while len(answer) <= MOST_BYTES and (some := await reader.read(1 << 16)):
                    answer += some
            finally:
                writer.close()
    except OSError:
        return ""
    head = _ANSWER.match(answer)
    return answer[head.end() :].decode(errors="replace") if head and len(answer) <= MOST_BYTES else ""


def _with(pod: Pod, text: str, version: str) -> Pod:
    found = parse(text, version)
    return pod if found is None else replace(pod, counted=found[0], restarts=pod.restarts + found[1])


def parse(text: str, version: str) -> tuple[Counters, int] | None:
    """The counters and the restarts in Prometheus' text form; None where one is not there, or there twice, is not what
    it should be, or of another version."""
    found = dict[str, float]()
    for name, labels, value in _LINE.findall(text):
        if name not in (*_WHOLE, *_SECONDS):
            continue
        named = _VERSION.search(labels)
        if name in found or named is None or named[1] != version:
            return None
        found[name] = float(value)
    if set(found) != {*_WHOLE, *_SECONDS} or not text.endswith("\n"):
        return None
    if not all(map(math.isfinite, found.values())) or any(found[name] % 1 for name in _WHOLE):
        return None
    counters = Counters(
        requests=int(found["requests"]),
        errors=int(found["errors"]),
        first_tokens=int(found["first_tokens"]),
        first_token_seconds=found["first_token_seconds"],
        tokens=int(found["tokens"]),
        token_seconds=found["token_seconds"],
    )
    return counters, int(found["restarts"])
