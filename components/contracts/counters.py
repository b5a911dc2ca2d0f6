"""What the requests of servers have come to, as numbers that grow: read by a rollout, told by a pod of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Self


class Sums:
    """Fields that are added."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Counters(Sums):
    """What the requests of one server, or of several, have come to. Numbers only grow, until a server starts anew."""

    requests: int = 0
    """Answered or failed."""
    errors: int = 0
    """Failed by the server's fault (5xx), or without an answer; not what was refused."""
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    """Summed over `first_tokens` answers."""
    tokens: int = 0
    """All tokens behind the first ones."""
    token_seconds: float = 0.0
    """Summed over `tokens`."""

    def since(self, before: Counters) -> Counters:
        """The growth; a counter that shrank has begun at 0 again, and so have all of its server."""
        pairs = [(getattr(self, one.name), getattr(before, one.name)) for one in fields(self)]
        return self if any(now < then for now, then in pairs) else Counters(*(now - then for now, then in pairs))

    @property
    def error_rate(self) -> float:
        """Of its requests."""
        return self.errors / self.requests if self.requests else 0.0


@dataclass(frozen=True)
class Window:
    """What a version's replicas have done since a step began, whichever of them came, went or started anew."""

    total: Counters = Counters()
    last: Mapping[str, Counters] = field(default_factory=dict)
    """Of each replica, as they were read last."""

    def read(self, now: Mapping[str, Counters]) -> Window:
        """With what they say now. A replica that was not there has begun at 0; one that does not answer may return."""
        total = self.total
        for replica, counters in now.items():
            total += counters.since(self.last.get(replica, Counters()))
        return Window(total, {**self.last, **now})

    def begin(self) -> Window:
        """Of the next step."""
        return Window(last=self.last)
