"""What people and versions do in the night, and what has to be true when it is over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from controllers import InPod, OnMachine
from stage import STAND_IN, VLLM, Served, Stage
from timeline import Look

Act = Callable[[Stage], None]


@dataclass(frozen=True)
class End:
    """Of one ModelRollout. Versions are numbers, as text."""

    champion: str
    weights: Mapping[str, int]
    """Per cent of the requests, as the HTTPRoute has it."""
    pods: frozenset[str]
    """Versions that have any."""
    decisions: Sequence[tuple[str, str]] = ()
    """Verdict and version, in this order among the last decisions."""
    reason: str = ""
    """What the last decision says among other things."""
    challenger: str = ""
    shares: Sequence[int] = ()
    """Per cent that the newest version had, one after the other."""
    never: Sequence[str] = ()
    """Versions that never had a share."""


def serves(version: str, *decisions: tuple[str, str], **more: Any) -> End:
    """Nothing but this version is there."""
    return End(version, {version: 100}, frozenset({version}), decisions, **more)


@dataclass(frozen=True)
class Scenario:
    """Version 1 serves when it begins."""

    name: str
    act: Act
    """What people do."""
    ends: Mapping[str, End]
    """By ModelRollout."""
    newcomers: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=lambda: _new({}))
    """How versions 2, 3 and so on of each behave (`stand_in`)."""
    policy: Mapping[str, Any] = field(default_factory=dict)
    before: Act | None = None
    """What people have done before; nothing is killed in it."""
    crashing: str = ""
    """A version whose streams may end in the middle."""
    changes: int = 3
    """How often at least what is stored of it changes (`Look.state`), any of which may be the last before a kill."""
    held_seconds: float = 2.0
    """How long the end has to stay."""
    controller: type[OnMachine | InPod] = OnMachine
    """Where it runs."""
    served: Served = STAND_IN
    """What it is served with."""


def _new(*behaviours: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    return {"m": behaviours}


def _set(alias: str, version: str = "2") -> Act:
    def act(stage: Stage) -> None:
        for name in stage.names:
            stage.ground.registry.point(stage.model(name), alias, version)

    return act


def _once(stage: Stage, there: Callable[[Look], bool], what: str) -> None:
    for name in stage.names:
        stage.wait(name, there, what)


def _another(stage: Stage) -> None:
    _set("challenger")(stage)
    _once(stage, lambda look: "2" in look.weights, "version 2 gets no requests")
    _set("challenger", "3")(stage)


def _overridden(stage: Stage) -> None:
    for name in stage.names:
        stage.change(name, override={"version": "2", "reason": "the night test says so"})


def _promoted(stage: Stage) -> None:
    _set("challenger")(stage)
    _once(stage, lambda look: look.serves_alone("2"), "2 does not serve")


def _rolled_back(stage: Stage) -> None:
    stage.run("rollback", *stage.names, "--reason", "the night test says so")


def _paused(stage: Stage) -> None:
    _set("challenger")(stage)
    _once(stage, lambda look: "2" in look.weights, "version 2 gets no requests")
    for name in stage.names:
        stage.change(name, paused=True)


def _without_image(stage: Stage) -> None:
    for name in stage.names:
        stage.change(name, image="localhost/nvila/nothing:none")
    _set("challenger")(stage)


def _corrupted(stage: Stage) -> None:
    for name in stage.names:
        stage.ground.registry.corrupt(stage.model(name), 2)
    _set("challenger")(stage)


STEPS = (25, 60, 100)
GOOD = serves("2", ("promoted", "2"), shares=STEPS)


def _back(reason: str, **more: Any) -> End:
    return serves("1", ("rolled back", "2"), reason=reason, **more)


def _unseen(reason: str) -> End:
    """No user's request ever reached it."""
    return _back(reason, never=["2"])


SCENARIOS = (
    Scenario("good", _set("challenger"), {"m": GOOD}, changes=8),
    Scenario(
        "real",
        _set("challenger"),
        {"m": GOOD},
        policy={"deadline_seconds": 600, "max_first_token_ratio": 1000, "max_token_ratio": 1000},
        served=VLLM,
    ),
    Scenario("good in a pod", _set("challenger"), {"m": GOOD}, changes=8, controller=InPod),
    Scenario(
        "wrong answers",
        _set("challenger"),
        {"m": _unseen("equal those of the evaluation")},
        _new({"answers": {}}),
        changes=4,
    ),
    Scenario("slow", _set("challenger"), {"m": _back("first token")}, _new({"slow": 0.6}), changes=5),
    Scenario(
        "crashes under load",
        _set("challenger"),
        {"m": _back("")},
        _new({"ends": True}),
        crashing="2",
        changes=5,
    ),
    Scenario("no such image", _without_image, {"m": _unseen("mage")}, policy={"deadline_seconds": 40}, changes=2),
    Scenario(
        "never ready",
        _set("challenger"),
        {"m": _unseen("ready")},
        _new({"hangs": True}),
        {"deadline_seconds": 40},
        changes=2,
    ),
    Scenario("corrupted file", _corrupted, {"m": _unseen("model.safetensors")}),
    Scenario(
        "two models",
        _set("challenger"),
        {"a": GOOD, "b": _unseen("equal those of the evaluation")},
        {"a": [{}], "b": [{"answers": {}}]},
        changes=8,
    ),
    Scenario(
        "second challenger",
        _another,
        {"m": serves("3", ("withdrawn", "2"), ("promoted", "3"), shares=STEPS)},
        _new({}, {}),
        changes=8,
    ),
    Scenario(
        "champion by hand",
        _set("champion"),
        {"m": serves("2", ("requested", "2"), ("promoted", "2"), shares=STEPS)},
        changes=8,
    ),
    Scenario("override", _overridden, {"m": serves("2", ("overridden", "2"))}, _new({"slow": 0.6})),
    Scenario(
        "rollback",
        _rolled_back,
        {"m": serves("1", ("promoted", "2"), ("overridden", "1"))},
        before=_promoted,
    ),
    Scenario(
        "paused",
        _paused,
        {"m": End("1", {"1": 75, "2": 25}, frozenset({"1", "2"}), challenger="2", shares=(25,))},
        policy={"min_seconds": 6},
        held_seconds=10,
    ),
)
