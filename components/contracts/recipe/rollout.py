"""Recipe sections `register` and `rollout`: the model's name in the registry and how it reaches users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from nvila.components.contracts.recipe.section import Section

Target = Literal["local", "none"]


@dataclass(frozen=True)
class Serving:
    """What a target does with a new version. The work is `rollout/step.py`'s."""

    about: str
    serves_here: bool
    """Whether it starts a server on this machine: it then needs a free port and vLLM, and no pod can do it."""


TARGETS: dict[Target, Serving] = {
    "none": Serving("registers the model only", serves_here=False),
    "local": Serving("starts a server beside the run (not on a cluster)", serves_here=True),
}


class RegisterSettings(Section):
    """MLflow registry."""

    model_name: str = Field(default="nvila-tiny", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")


class Policy(Section):
    """When a new version becomes champion."""

    pinned_prompts: int = 12
    """Held-out questions asked of the new endpoint before the alias moves."""
    min_agreement: float = Field(default=0.75, ge=0, le=1)
    """Least share of pinned prompts whose answer equals the evaluated model's."""
    max_error_rate: float = Field(default=0.0, ge=0, le=1)
    deadline_seconds: float = 300.0
    """Longest wait for the server to get ready."""


class RolloutSettings(Section):
    """Where and how the model is served."""

    target: Target = "local"
    """`local` starts vLLM on this machine; `none` registers only."""
    host: str = "127.0.0.1"
    port: int = Field(default=8321, ge=1, le=65535)
    policy: Policy = Policy()
