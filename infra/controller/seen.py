"""What one round of the controller has seen, as plain values: all that `decide` knows beside spec and status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nvila.components.rollout.policy import Asked, Counters


@dataclass(frozen=True)
class Aliases:
    """What the registry's aliases of a model name; empty: nothing."""

    challenger: str = ""
    champion: str = ""
    previous: str = ""


@dataclass(frozen=True)
class Registered:
    """A version in the registry."""

    model: str
    version: str
    digest: str = ""
    """Of its manifest; empty where no run of ours registered it."""
    pinned: str = ""
    """SHA-256 of its file of pinned prompts; empty where it has none."""
    source: str = ""
    """Where its files are."""
    approved_by: str = ""
    user: str = ""
    """Who registered it, where MLflow knows."""


@dataclass(frozen=True)
class Pod:
    """A serving pod."""

    name: str
    address: str = ""
    ready: bool = False
    restarts: int = 0
    """How often its endpoint, or the server in it, has ended by itself."""
    why: str = ""
    """What keeps it from being ready, by name and in words: `Unschedulable: 0/3 nodes ...`."""
    fatal: bool = False
    """Whether `why` cannot pass by itself: its files are not those of the version."""
    counted: Counters | None = None
    """What its requests have come to; None where it does not say, or was not asked."""


@dataclass(frozen=True)
class Running:
    """The pods of one version."""

    pods: tuple[Pod, ...] = ()
    wanted: int = 1
    """How many there are to be."""
    why: str = ""
    """What keeps pods from being made: `Quota: exceeded ...`."""
    unreached: str = ""
    """Why no request gets to them, though they are ready; empty where that was not tried."""

    @property
    def ready(self) -> bool:
        """Whether all of them are, and requests get there."""
        return sum(pod.ready for pod in self.pods) >= self.wanted > 0 and not self.unreached

    @property
    def ended(self) -> int:
        """How often one has ended by itself."""
        return sum(pod.restarts for pod in self.pods)

    @property
    def trouble(self) -> str:
        """The first reason why not all are ready."""
        return self.why or next((pod.why for pod in self.pods if pod.why and not pod.ready), self.unreached)

    @property
    def fatal(self) -> str:
        """A reason that cannot pass."""
        return next((pod.why for pod in self.pods if pod.fatal), "")

    @property
    def counted(self) -> dict[str, Counters]:
        """By pod."""
        return {pod.name: pod.counted for pod in self.pods if pod.counted is not None}


@dataclass(frozen=True)
class Sight:
    """What is known of one model."""

    now: float
    """Seconds since the epoch."""
    aliases: Aliases | None
    """None: the registry does not answer."""
    versions: Mapping[str, Registered] = field(default_factory=dict)
    """By number: those that an alias, the override or the status names, as far as the registry has them."""
    running: Mapping[str, Running] = field(default_factory=dict)
    """By version."""
    asked: Mapping[str, Asked] = field(default_factory=dict)
    """By version: what it did with all pinned prompts, where it was asked since it is tried."""
    routed: bool = True
    """Whether the Gateway has taken up who gets which requests, as far as it says; until then no pods go."""
    missing: str = ""
    """What else is missing in the cluster, such as the Gateway."""
