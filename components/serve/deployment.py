"""What is to be served and what is: two small records in `<runs folder>/serving/`, each with one writer.

`wanted.json` is written, by rename and under `exclusive`, by whoever decides: `nvila serve`, `nvila stop`, a rollout.
`status.json` is written by the supervisor alone, which makes true what is wanted. A third, `decision.json`, keeps what
the last rollout decided.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from nvila.components.contracts.processes import Process
from nvila.components.contracts.recipe.endpoint import EndpointSettings

Role = Literal["champion", "challenger"]
State = Literal["starting", "ready", "waiting", "draining"]
"""Of one version's server: loading; answering; between an end and the next start; its last requests are answered."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Version(_Record):
    """A version of a model."""

    name: str
    """Of the model: what requests call it, and the registry."""
    version: str
    digest: str
    """Of the model's manifest."""
    model_dir: str
    """Its serving folder."""


class Wanted(_Record):
    """What is to be served."""

    generation: int
    """One more with each change, so that a status tells which one it is of."""
    host: str
    port: int = Field(ge=1, le=65_535)
    settings: EndpointSettings = EndpointSettings()
    key: str | None = None
    """Salted scrypt of the key that the endpoint asks for, as `fingerprint` makes it; None leaves it open. The key
    itself is in the memory of the supervisor only."""
    champion: Version | None = None
    """None while the first version is tried."""
    challenger: Version | None = None
    """The version that is tried beside it."""
    weight: int = Field(default=0, ge=0, le=100)
    """Per cent of the requests that the challenger gets."""
    tried_by: Process | None = None
    """Who tries the challenger: it is dropped where that process is gone. None: nobody does."""
    stopped: bool = False
    """Everything is to end."""


class VersionStatus(_Record):
    """One version's server."""

    version: Version
    role: Role
    state: State
    url: str
    """Its own base URL on this machine, without Envoy; it asks for the same key."""
    pid: int
    since: float
    """When it got into this state, in seconds since the epoch."""
    restarts: int = 0
    """How often it ended by itself."""
    ended: str = ""
    """How it did so the last time, with the last lines of its log."""
    log: str


class Status(_Record):
    """What the supervisor has made of it."""

    generation: int
    """The `wanted` that Envoy and servers are now as asked."""
    supervisor: Process
    url: str
    """What users are given, without `/v1`."""
    admin: str
    """Base URL, or path of the socket, of Envoy's admin interface."""
    envoy_restarts: int = 0
    since: float
    """When the endpoint first answered, in seconds since the epoch; 0 before."""
    restarts: int = 0
    """How often the supervisor itself was taken over from a dead one."""
    versions: list[VersionStatus] = []
    trouble: str = ""
    """Why it cannot do what is wanted, where it cannot."""


class Decision(_Record):
    """What a rollout decided last."""

    at: float
    """In seconds since the epoch."""
    version: Version
    decision: Literal["promoted", "rolled back", "held"]
    reasons: list[str]
