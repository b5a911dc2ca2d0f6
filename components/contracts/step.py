"""What a step is: a module with `Settings` and `run(settings, inputs, out)`.

Where it reads the world outside the store it has `external(settings) -> dict`, digests of what it reads; where
something has to be made there before these are taken, `prepare(settings)`, which does nothing the second time. Where
some settings only say how the work is done, it has `keyed(settings) -> dict`, the others: begun work goes on with them.

A step's arguments are what its result depends on. A step that has to know of the machine or the pipeline run that it
works for asks for it by an argument more, `here: Environment`, of `run` and `external`; no other step is given it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.manifest import File, InputRef, Kind
from nvila.components.contracts.results.result import Result


@dataclass(frozen=True)
class Outcome:
    """What a step made; `execute` turns it into the manifest."""

    kind: Kind
    result: Result | None = None
    """What was found out, in the form of this step; the same in every execution of the same work."""
    sources: list[File] = field(default_factory=list)
    """The user's own files that were read."""
    start: InputRef | None = None
    """The manifest of the model of another run that it went on from, for the lineage (`manifest.START`)."""
    files: tuple[str, ...] = ("**/*",)
    """Glob patterns, relative to the step's folder, of the files that belong to the output."""
    read: Mapping[str, Any] | None = None
    """Of a step whose `external` can change while it works: the same, of what was really read. None where the step
    does not tell. Another value than the content key has means that the key is not of this work."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """Measurements of this one execution (seconds, samples per second, bytes): tracked, not part of the identity."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    """Where it was made (`Manifest.machine`); the runner knows, not the step."""


def call(function: Callable[..., Any], *arguments: Any, here: Environment) -> Any:
    """What a step's function returns, given the environment if it asks for it."""
    return function(*arguments, here) if "here" in inspect.signature(function).parameters else function(*arguments)
