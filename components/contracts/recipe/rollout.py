"""Recipe sections `register` and `rollout`: the model's name in the registry and how it reaches users."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from nvila.components.contracts.recipe.endpoint import EndpointSettings, host_name
from nvila.components.contracts.recipe.section import Disagreement, Section, Share

Target = Literal["local", "none", "kubernetes"]
Strategy = Literal["side-by-side", "replace"]
Seconds = Annotated[float, Field(ge=1, le=86_400)]
Ratio = Annotated[float, Field(ge=1, le=1000)]
MOST_STEPS = 100


@dataclass(frozen=True)
class Serving:
    """What a target does with a new version. The work is `rollout/step.py`'s."""

    about: str
    serves_here: bool
    """Whether it starts a server on this machine: it then needs a free port and vLLM, and no pod can do it."""
    in_pods: bool = False
    """Whether pods of a cluster serve it: it then needs a cluster with the controller, and room for two versions."""


TARGETS: dict[Target, Serving] = {
    "none": Serving("registers the model only", serves_here=False),
    "local": Serving("starts a server beside the run (not on a cluster)", serves_here=True),
    "kubernetes": Serving("has a cluster's controller bring it to users in steps", serves_here=False, in_pods=True),
}


class RegisterSettings(Section):
    """MLflow registry."""

    model_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=150)
    """Of the registered model; `nvila-` and the recipe's name where none is given."""


class Policy(Section):
    """When a new version becomes champion; `rollout/policy.py` has the table."""

    pinned_prompts: int = Field(default=12, ge=1, le=10_000)
    """Held-out questions asked of the new version before a user's request reaches it."""
    min_agreement: Share = 0.75
    """Least share of pinned prompts whose answer equals the evaluated model's."""
    max_error_rate: Share = 0.0
    """Largest share of pinned prompts, and at each step of requests, that end in an error of the server."""
    deadline_seconds: Seconds = 300.0
    """Longest wait for the server to get ready; 1800 with the target `kubernetes`: nodes and images come first."""
    steps: list[Annotated[int, Field(ge=1, le=100)]] = Field(default=[10, 50], max_length=MOST_STEPS)
    """Per cent of the requests that the new version gets beside the champion, one step after the other; none: it takes
    over once the pinned prompts are answered. 5, 25, 50, 100 with the target `kubernetes`."""
    min_requests: int = Field(default=12, ge=0, le=10**7)
    """Requests that the new version has to have answered at each step; where users ask fewer, pinned prompts are asked
    of both versions."""
    min_seconds: Annotated[float, Field(ge=0, le=86_400)] = 5.0
    """Least time of a step."""
    step_deadline_seconds: Seconds = 600.0
    """Longest time of a step."""
    max_first_token_ratio: Ratio = 2.0
    """Longest mean time to the first token, as a multiple of the champion's in the same step."""
    max_token_ratio: Ratio = 2.0
    """The same from token to token."""
    max_restarts: int = Field(default=0, ge=0, le=1000)
    """How often the new version may end by itself."""

    def disagreements(self) -> Iterator[Disagreement]:
        """Steps go up."""
        if any(after <= before for before, after in pairwise(self.steps)):
            yield Disagreement("steps", "each step gives the new version more requests than the one before", self.steps)
        if self.min_seconds > self.step_deadline_seconds:
            yield Disagreement("min_seconds", "a step ends before its least time is over", self.min_seconds)


class RolloutSettings(Section):
    """Where and how the model is served."""

    target: Target = "local"
    """`local` starts vLLM on this machine; `none` registers only; `kubernetes` asks the controller of a cluster
    (docs/promotion.md)."""
    host: Annotated[str, Field(min_length=1, max_length=253), AfterValidator(host_name)] = "127.0.0.1"
    """Address to listen on, or a name of this machine."""
    port: int = Field(default=8321, ge=1, le=65535)
    """Port to listen on."""
    strategy: Strategy = "side-by-side"
    """`side-by-side`: the new version runs beside the champion, no request is lost, and memory has to hold both.
    `replace`: the champion is stopped before the new version starts, nothing is served meanwhile, and the champion is
    started again where the new version is refused."""
    policy: Policy = Policy()
    """When the version becomes champion. On a cluster that serves the model already, its ModelRollout's holds."""

    endpoint: EndpointSettings = EndpointSettings()
    """What the endpoint lets people do. On a cluster that serves the model already, its ModelRollout's holds."""

    @model_validator(mode="before")
    @classmethod
    def _policy_of_pods(cls, content: Any) -> Any:
        """What a recipe does not say of the policy is as in a ModelRollout, where that is what it becomes."""
        target = content.get("target") if isinstance(content, Mapping) else None
        if not isinstance(target, str) or target not in TARGETS or not TARGETS[target].in_pods:
            return content
        from nvila.components.contracts.modelrollout import ServingPolicy

        said = content.get("policy", {})
        if not isinstance(said, Mapping):
            return content
        fields = {name: ServingPolicy.model_fields[name].default for name in Policy.model_fields}
        return {**content, "policy": {**fields, **said}}

    def disagreements(self) -> Iterator[Disagreement]:
        """Nothing is said that pods cannot do."""
        if not TARGETS[self.target].in_pods:
            return
        from nvila.components.contracts.modelrollout import ServingEndpoint, ServingPolicy

        for name in ("host", "port", "strategy"):
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                yield Disagreement(name, f"has no effect with the target {self.target}; leave it out", value)
        for part, kind in (("policy", ServingPolicy), ("endpoint", ServingEndpoint)):
            there = kind.model_construct(**dict(getattr(self, part)))
            for option, why, value in there.disagreements():
                yield Disagreement(f"{part}.{option}", why, value)
