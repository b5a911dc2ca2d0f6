"""Recipe sections `register` and `rollout`: the model's name in the registry and how it reaches users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from nvila.components.contracts.recipe.endpoint import EndpointSettings, host_name
from nvila.components.contracts.recipe.section import Section, Share

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

    model_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=150)
    """Of the registered model; `nvila-` and the recipe's name where none is given."""


class Policy(Section):
    """When a new version becomes champion."""

    pinned_prompts: int = Field(default=12, ge=1, le=10_000)
    """Held-out questions asked of the new endpoint before the alias moves."""
    min_agreement: Share = 0.75
    """Least share of pinned prompts whose answer equals the evaluated model's."""
    max_error_rate: Share = 0.0
    """Largest share of pinned prompts that end in an error."""
    deadline_seconds: float = Field(default=300.0, ge=1, le=86_400)
    """Longest wait for the server to get ready."""


class RolloutSettings(Section):
    """Where and how the model is served."""

    target: Target = "local"
    """`local` starts vLLM on this machine; `none` registers only."""
    host: Annotated[str, Field(min_length=1, max_length=253), AfterValidator(host_name)] = "127.0.0.1"
    """Address to listen on, or a name of this machine."""
    port: int = Field(default=8321, ge=1, le=65535)
    """Port to listen on."""
    policy: Policy = Policy()
    """When the version becomes champion."""

    endpoint: EndpointSettings = EndpointSettings()
    """What the endpoint lets people do."""
