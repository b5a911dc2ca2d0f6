"""What the steps tell that begin a run, deliver what it made, and close it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from nvila.components.contracts.exits import Exit
from nvila.components.contracts.results.result import Result


class Resolution(Result):
    """Of `resolve`."""

    recipe: dict[str, Any]
    """All of it, defaults filled in."""
    slices: dict[str, dict[str, Any] | None]
    """Each step's part, by step name."""

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.recipe.get("name", ""))


class Preflight(Result):
    """Of `preflight`."""

    annotations: dict[str, str]
    """Digest of each annotation file that was found."""


class Registration(Result):
    """Of `register`."""

    name: str
    version: str
    model_uri: str


class Rollout(Result):
    """Of `rollout`."""

    model: str
    version: str
    endpoint: str | None
    decision: str
    pinned: dict[str, int]
    """What the version did with the pinned prompts."""
    reasons: list[str] = []
    """Why it was decided so, step by step."""
    hostnames: list[str] = []
    """Names that users ask on a cluster; none where the Gateway has its own."""


class Ending(Result):
    """Of `report`: how the run ended."""

    outcome: Literal["succeeded", "rejected", "stopped", "failed"]
    exit_code: Annotated[Exit, Field(strict=False)]
    """The one that is meant: what Kubeflow knows of a step's is that it was not 0."""
    step: str | None = None
    """The step that ended it early."""
    message: str | None = None
    """Why, without secrets."""
