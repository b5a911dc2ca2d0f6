"""The custom resource `ModelRollout`: what people decide of a served model (`spec`), and what is (`status`).

One object per registered model. Which version is wanted stands only in the registry's alias `challenger`; `status` is
the controller's own record, and with the cluster and the registry all that it knows from one round to the next.

Names are camelCase in the cluster, as Kubernetes has it, and ours in Python; `nvila.infra.controller.crd` makes the
CustomResourceDefinition of these classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.contracts.recipe.rollout import Policy
from nvila.components.contracts.recipe.section import Disagreement, Section
from nvila.components.contracts.serving import CAMEL, Serving

GROUP, VERSION, KIND, PLURAL, SINGULAR, SHORT = (
    "nvila.io",
    "v1alpha1",
    "ModelRollout",
    "modelrollouts",
    "modelrollout",
    "mro",
)
API = f"{GROUP}/{VERSION}"
MANAGER = "nvila-controller"
"""The controller's name as an owner of fields."""

MODEL_LABEL, VERSION_LABEL, ROLE_LABEL = f"{GROUP}/rollout", f"{GROUP}/version", f"{GROUP}/role"
"""Labels of what the controller makes: the ModelRollout's name, the registry's number of the version."""
PART_LABELS = {"app.kubernetes.io/part-of": "nvila", "app.kubernetes.io/component": "serving"}
"""Labels of every serving pod, as NetworkPolicies and monitoring select them."""
CONTAINER, FETCH = "endpoint", "weights"
"""In a serving pod: the container that serves, and the init container before it."""
HTTP_PORT, METRICS_PORT = 8321, 9321
"""Of a serving pod: the endpoint, and what it has counted (`serve/exporter.py`), which no Service names."""
PIN_HEADER = "x-nvila-version"
"""Header by which a client asks one version and no other."""

MOST_DECISIONS = 10
MOST_PINNED = 64
"""Prompts that `register` keeps with a version; a policy on a cluster cannot ask for more."""
PINNED_FILE, MOST_PINNED_BYTES = "pinned.jsonl", 32 * 2**20
"""The file that has them, beside the version's manifest: a line of JSON each, with `id`, `body` (the chat request with
its media), `expected` (what the evaluated model said) and `answer` (the truth). And most that it takes."""

Alias = Literal["challenger", "champion", "previous"]
Number = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
"""Of a version in the registry."""


class ServingPolicy(Policy):
    """When a new version becomes champion, as the recipe's `rollout.policy`."""

    model_config = CAMEL

    steps: list[Annotated[int, Field(ge=1, le=100)]] = Field(default=[5, 25, 50, 100], max_length=100)
    """Per cent of the requests that the new version gets, one step after the other; none: it takes over once the pinned
    prompts are answered."""
    deadline_seconds: Annotated[float, Field(ge=1, le=86_400)] = 1800.0
    """Longest wait for the pods to get ready: nodes, images, weights and loading."""
    drain_seconds: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """Time without new requests that the pods of a version get before they are told to end."""

    def disagreements(self) -> Iterator[Disagreement]:
        """No more prompts than a version brings along."""
        yield from super().disagreements()
        if self.pinned_prompts > MOST_PINNED:
            why = f"a version in the registry has at most {MOST_PINNED} pinned prompts"
            yield Disagreement("pinned_prompts", why, self.pinned_prompts)


class ServingEndpoint(EndpointSettings):
    """What the endpoint lets people do, as the recipe's `rollout.endpoint`; TLS is the Gateway's."""

    model_config = CAMEL

    def disagreements(self) -> Iterator[Disagreement]:
        """Nothing that lies on one machine."""
        yield from super().disagreements()
        for name in ("certificate", "media_folders", "adapters"):
            if value := getattr(self, name):
                yield Disagreement(name, "pods have no files of people; leave it out", value)


class Override(Section):
    """Serve this version now, without steps. It is acted on once; another reason makes it another one."""

    model_config = CAMEL

    version: Number
    reason: Annotated[str, Field(min_length=1, max_length=500)]
    """Why, for the record; `nvila rollback` writes one."""


class Spec(Serving):
    """What people decide; nothing of ours changes it after the object was made, but for `nvila rollback`.

    Another image, other pods or another endpoint hold at once, also for the version that serves: Kubernetes replaces
    its pods one by one, each when the new one is ready.
    """

    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=150)]
    """The registered model; also what requests call it. It is served by one ModelRollout, and never becomes another."""
    endpoint: ServingEndpoint = ServingEndpoint()
    """Limits and permissions of requests."""
    policy: ServingPolicy = ServingPolicy()
    """When a new version becomes champion."""
    paused: bool = False
    """No version begins, advances or is promoted; one that fails is still rolled back."""
    override: Override | None = None
    """A version to serve now."""
    approvers: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default=[], max_length=64)
    """Where any are named, a version gets requests of users once its tag `nvila.approved-by` names one of them."""


class Record(BaseModel):
    """A part of `status`: read with patience, for an older controller may have written it."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, alias_generator=to_camel, populate_by_name=True, use_attribute_docstrings=True
    )


Phase = Literal["Empty", "Preparing", "Asking", "Shifting", "Serving", "Blocked"]
"""Nothing is served or tried; a version's pods start; its answers are compared; it gets requests; one serves and none
is tried; people have to do something first."""
Time = str
"""RFC 3339, in UTC, as Kubernetes writes times."""


class Counted(Record):
    """`rollout.policy.Counters` of one pod, or summed."""

    requests: int = 0
    errors: int = 0
    first_tokens: int = 0
    first_token_seconds: float = 0.0
    tokens: int = 0
    token_seconds: float = 0.0


class Answered(Record):
    """`rollout.policy.Asked`: what a version did with the pinned prompts."""

    asked: int = 0
    errors: int = 0
    agreed: int = 0
    right: int = 0
    without_value: int = 0


class Seen(Record):
    """What the pods of one version have done since the step began."""

    total: Counted = Counted()
    last: dict[str, Counted] = {}
    """By pod, as they were read last."""


class Served(Record):
    """A version that serves, or did."""

    version: str
    digest: str
    """Of its manifest."""
    since: Time


class Tried(Served):
    """The version that is tried."""

    override: bool = False
    """Whether it takes over as soon as its pods are ready, as people said."""
    step: int = 0
    """0 before users reach it; then as of the policy's `steps`."""
    step_since: Time
    pinned: Answered | None = None
    """What it did with the pinned prompts; None before they were asked."""
    champion_pinned: Answered | None = None
    seen: Seen = Seen()
    champion_seen: Seen = Seen()
    reasons: list[str] = []
    """Why it was let on, step by step."""


Verdict = Literal["promoted", "rolled back", "withdrawn", "requested", "put back", "overridden", "refused"]
"""It serves now; it does not, as the policy says; people want another or none; the alias `champion` was moved to it by
hand, so it is tried; that alias was gone; it serves now, as people said; it cannot be tried at all."""


class Decided(Record):
    """A decision with its numbers."""

    at: Time
    verdict: Verdict
    version: str
    instead_of: str = ""
    """The version that served then."""
    reasons: list[str] = []
    step: int = 0
    weight: int = 0
    """Per cent of the requests that it had."""
    counted: Counted | None = None
    champion_counted: Counted | None = None
    pinned: Answered | None = None
    user: str = ""
    """Who asked for it, where that is known."""
    told: bool = False
    """Whether the notification webhook has it, or never will."""


class Write(Record):
    """Something that the registry is still to be told; each may be repeated."""

    alias: Alias | None = None
    version: str = ""
    """That the alias is to name; empty: it is to go. Of a tag, the version that gets it."""
    expects: str | None = None
    """What the alias named when this was decided: where it names another by now, somebody has asked for that one. None:
    whatever it names."""
    tag: str = ""
    text: str = ""


class Condition(Record):
    """As Kubernetes has them."""

    type: Literal["Ready", "RegistryReachable", "Progressing"]
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: Time


class Status(Record):
    """What is."""

    observed_generation: int = 0
    model: str = ""
    """Of the registry, that all else here is about."""
    phase: Phase = "Empty"
    message: str = ""
    """The story in a line."""
    champion: Served | None = None
    """What serves."""
    challenger: Tried | None = None
    """What is tried."""
    previous: Served | None = None
    """What served before."""
    leaving: list[Served] = []
    """Versions that get no more requests, since when; their pods still answer what they have."""
    step: int = 0
    steps: int = 0
    weight: int = 0
    """Per cent of the requests that the challenger gets."""
    overridden: Override | None = None
    """The override that was acted on last."""
    pending: list[Write] = []
    decisions: list[Decided] = []
    """The last ones, the newest first."""
    conditions: list[Condition] = []


def dump(record: BaseModel) -> dict[str, Any]:
    """As the cluster has it."""
    return record.model_dump(mode="json", by_alias=True, exclude_none=True)
