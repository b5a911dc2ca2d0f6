"""Clients that ask a served model on and on, and what is wrong with the answers they got."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import elsewhere  # noqa: F401
from load import Reply, Request, Steady, chat, send
from timeline import Timeline

from nvila.components.contracts.modelrollout import PIN_HEADER

TOKENS = 8
"""Of a stream, some hundredths of a second each."""


@dataclass(frozen=True)
class Kind:
    """A kind of client."""

    name: str
    clients: int
    stream: bool = False
    pin: str = ""
    """The version that it asks by header."""


KINDS = (
    Kind("plain", 3),
    Kind("stream", 2, stream=True),
    Kind("pin 1", 1, pin="1"),
    Kind("pin 2", 1, stream=True, pin="2"),
)


@dataclass
class Judged:
    """What the clients of a model got."""

    asked: int = 0
    lost: int = 0
    """Not answered to the end: 5xx, a broken connection, a stream without its last chunk."""
    broken: int = 0
    """Streams that ended in the middle, whose first token came from the version that is meant to crash."""
    wrong: int = 0
    """Answers of a version that the pin or the time excludes."""
    examples: tuple[str, ...] = ()


class Asking:
    """The clients of one model."""

    def __init__(self, url: str, host: str, model: str, pause_seconds: float = 0.15) -> None:
        self._once = next(_requests(KINDS[0], host, model))
        self._url = url
        self._steady = {kind: Steady(url, _requests(kind, host, model), kind.clients, pause_seconds) for kind in KINDS}

    def answered(self) -> bool:
        """Whether one request is."""
        return send(self._url, self._once).answered

    @contextmanager
    def kept_up(self) -> Iterator[Asking]:
        """They ask as long as the context is open."""
        with ExitStack() as stack:
            for steady in self._steady.values():
                stack.enter_context(steady)
            yield self

    def judge(self, timeline: Timeline, crashing: str = "", *, named: bool = True) -> Judged:
        """Hold every answer against what was stored when it was given.

        Args:
            timeline: of the ModelRollout.
            crashing: the version whose streams may end in the middle.
            named: answers say which version gave them.
        """
        found, examples = Judged(), list[str]()
        for kind, steady in self._steady.items():
            for reply in steady.replies:
                found.asked += 1
                what = _fault(kind, reply, timeline, crashing, named)
                if what:
                    setattr(found, what, getattr(found, what) + 1)
                if what in ("lost", "wrong"):
                    at = reply.began - timeline.looks[0].at
                    examples.append(
                        f"{what}: {kind.name} at {at:.1f} s, {reply.status}, {reply.error}{reply.body[:99]!r}"
                    )
        found.examples = tuple(dict.fromkeys(examples))[:8]
        return found


def _fault(kind: Kind, reply: Reply, timeline: Timeline, crashing: str, named: bool) -> str:
    looks = timeline.between(reply.began, reply.began + reply.seconds)
    version = version_of(reply) if named else ""
    if kind.pin:
        reached = [kind.pin in look.pinned for look in looks]
        if reply.status == 404 and not all(reached):
            return ""  # nobody has that version now
        if kind.pin == crashing and not reply.answered:
            return ""  # it was to be that one and no other
        if version and version != kind.pin:
            return "wrong"
    elif version and version not in {one for look in looks for one in look.serves}:
        return "wrong"
    if reply.answered:
        return "" if version or not named else "wrong"
    return "broken" if crashing and version == crashing and kind.stream else "lost"


def version_of(reply: Reply) -> str:
    """Number of the version that answered, as its behaviour says it: `v2`; empty where nobody did."""
    text = reply.body.decode(errors="replace")
    try:
        if text.startswith("data: "):
            said = json.loads(text.partition("\n")[0].removeprefix("data: "))["choices"][0]["delta"]["content"]
        else:
            said = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return ""
    return str(said).removeprefix("v")


def _requests(kind: Kind, host: str, model: str) -> Iterator[Request]:
    headers = {"Content-Type": "application/json", "Host": host} | ({PIN_HEADER: kind.pin} if kind.pin else {})
    for number in itertools.count():
        request = chat(model, f"question {number}", stream=kind.stream, max_tokens=TOKENS)
        yield Request(request.path, request.body, headers)


def total(judged: Sequence[Judged]) -> Judged:
    """Of several models."""
    return Judged(
        *(sum(getattr(one, name) for one in judged) for name in ("asked", "lost", "broken", "wrong")),
        tuple(itertools.chain.from_iterable(one.examples for one in judged)),
    )
