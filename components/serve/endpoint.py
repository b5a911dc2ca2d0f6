"""The records of servers on this machine: `<runs folder>/serving/{endpoint,challenger}.json`, written by rename.

Rollout and `nvila serve` write them; whoever asks what is being served, or who holds the port, reads them here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from nvila.components.contracts import locks
from nvila.components.contracts.files import discard, read_json, write_atomic
from nvila.components.contracts.processes import birth

SERVING = "serving"
ENDPOINT, CHALLENGER = "endpoint", "challenger"
"""Names of records: the one users talk to, which outlives who started it, and one that is tried, which does not."""


class Endpoint(BaseModel):
    """A server that was started and what it serves."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    url: str
    """Base URL without `/v1`."""
    pid: PositiveInt
    born: float
    """When the process started, as `birth` says it: tells it from a later one with the same id."""
    host: str
    port: int
    model: str
    """Name that requests give, and the registered model's."""
    version: str
    digest: str
    """Of the model's manifest."""
    model_dir: str
    log: str
    pinned: dict[str, int] = {}
    """What it did with the pinned prompts before it became champion."""

    @property
    def alive(self) -> bool:
        """Whether that very process still runs."""
        since_boot = birth(self.pid)
        return since_boot is not None and self.born in (since_boot, _since_epoch(self.pid))


def _since_epoch(pid: int) -> float | None:
    """What records of earlier versions say."""
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def read(runs: Path, name: str = ENDPOINT) -> Endpoint | None:
    """The record, dead or alive; None where there is none, it is not ours, or it is torn, which is said."""
    try:
        return Endpoint.model_validate(read_json(path(runs, name)))
    except ValidationError:
        return None


def alive(runs: Path) -> list[Endpoint]:
    """The servers that were recorded and still run."""
    found = (read(runs, name) for name in (ENDPOINT, CHALLENGER))
    return [endpoint for endpoint in found if endpoint and endpoint.alive]


def write(runs: Path, endpoint: Endpoint, name: str = ENDPOINT) -> None:
    """Keep the record."""
    write_atomic(path(runs, name), json.dumps(endpoint.model_dump(), indent=1) + "\n")


def keep(runs: Path, endpoint: Endpoint) -> None:
    """Make the one that was tried the one that users talk to."""
    write(runs, endpoint)
    forget(runs, CHALLENGER)


def forget(runs: Path, name: str = ENDPOINT) -> None:
    """Remove the record."""
    discard(path(runs, name))


@contextmanager
def exclusive(runs: Path) -> Iterator[None]:
    """Only one process at a time starts or stops servers of a runs folder."""
    folder = runs / SERVING
    folder.mkdir(parents=True, exist_ok=True)
    with locks.alone(folder / ".lock", f"{folder}: another process starts or stops a server"):
        yield


def path(runs: Path, name: str = ENDPOINT) -> Path:
    """Where a record lies."""
    return runs / SERVING / f"{name}.json"
