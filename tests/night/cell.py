"""One cell of the night test: a scenario, a kill point, and whether everything was right in the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from asking import Judged, total
from ground import Ground
from kill_points import KILLS, Moment, killing
from scenarios import End, Scenario
from stage import Stage
from timeline import Look, Timeline


@dataclass(frozen=True)
class Row:
    """What came of a cell."""

    scenario: str
    kill: str
    right: bool
    end: str
    """What was there in the end."""
    seconds: float
    """From what people did to the end state."""
    asked: int
    lost: int
    broken: int
    wrong: int
    faults: list[str] = field(default_factory=list)
    moment: str = ""
    """What was stored when something was killed."""
    deployed_seconds: float | None = None
    """From the alias to the newcomer's Deployment."""
    back_seconds: float | None = None
    """Of a version that is rolled back: from its first share of the requests to none."""
    memory_mb: float = 0.0
    """Most that the controller took."""

    def dump(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


def run_cell(ground: Ground, scenario: Scenario, kill: str) -> Row:
    """Play it once."""
    moment = Moment.of(f"{scenario.name}:{kill}", scenario.changes)
    stage = Stage(ground, list(scenario.ends), scenario.controller, scenario.served, **scenario.policy)
    with stage.standing():
        for name in stage.names:
            for number, behaviour in enumerate(({}, *scenario.newcomers[name]), 1):
                stage.register(name, number, **behaviour)
        with stage.asked():
            if scenario.before:
                scenario.before(stage)
            began = time.monotonic()
            with killing(stage, KILLS[kill], moment):
                scenario.act(stage)
            ended = _wait(stage, scenario)
            time.sleep(scenario.held_seconds)
            memory = round(stage.controller.process().memory_info().rss / 1e6, 1)
        faults = [fault for name in stage.names for fault in _faults(stage, name, scenario.ends[name], began)]
        judged = total([_judged(stage, name, scenario) for name in stage.names])
        faults += [f"no clients: {judged.asked} requests"] if judged.asked < 50 else []
        timeline = stage.timelines[stage.names[-1]]
        faults += judged.examples
        faults += [stage.said()] if faults else []
        return Row(
            scenario=scenario.name,
            kill=kill,
            right=not faults and judged.lost == judged.wrong == 0,
            end=", ".join(_words(stage, name) for name in stage.names),
            seconds=round(ended - began, 1),
            faults=faults,
            moment=moment.told,
            deployed_seconds=_rounded(_deployed(timeline, began)),
            back_seconds=_rounded(_back(timeline, began)),
            memory_mb=memory,
            **_counts(judged),
        )


def _judged(stage: Stage, name: str, scenario: Scenario) -> Judged:
    return stage.asking[name].judge(stage.timelines[name], scenario.crashing, named=not stage.served.real)


def _counts(judged: Judged) -> dict[str, int]:
    return {name: getattr(judged, name) for name in ("asked", "lost", "broken", "wrong")}


def _wait(stage: Stage, scenario: Scenario) -> float:
    """When everything was as it has to be, or when patience was over."""
    deadline = time.monotonic() + stage.served.patience_seconds
    while time.monotonic() < deadline:
        if not any(_differs(stage, name, end) for name, end in scenario.ends.items()):
            break
        time.sleep(0.2)
    return time.monotonic()


def _differs(stage: Stage, name: str, end: End) -> list[str]:
    """What is not as it has to be in the end."""
    look = stage.timelines[name].last
    pairs: list[tuple[str, Any, Any]] = [
        ("weights", look.weights, dict(end.weights)),
        ("pods of versions", sorted(look.pods), sorted(end.pods)),
        ("Deployments of versions", sorted(look.deployments), sorted(end.pods)),
        ("the champion's Service selects", look.champion, end.champion),
        ("the champion in status", (look.status.get("champion") or {}).get("version"), end.champion),
        ("pending writes", look.status.get("pending", []), []),
    ]
    found = [f"{what}: {is_} and not {wanted}" for what, is_, wanted in pairs if is_ != wanted]
    return found or _registry_differs(stage, name, end)


def _registry_differs(stage: Stage, name: str, end: End) -> list[str]:
    aliases = stage.ground.registry.aliases(stage.model(name))
    pairs = (("champion", end.champion), ("challenger", end.challenger))
    return [
        f"alias {alias}: {aliases.get(alias)} and not {wanted}"
        for alias, wanted in pairs
        if aliases.get(alias, "") != wanted
    ]


def _faults(stage: Stage, name: str, end: End, began: float) -> Iterator[str]:
    """What was not as it has to be, in the end or on the way there."""
    timeline, decisions = stage.timelines[name], stage.timelines[name].last.status.get("decisions", [])
    for difference in _differs(stage, name, end):
        yield f"{name}: {difference}"
    made = [(one["verdict"], one["version"]) for one in reversed(decisions)]
    if not _in_order(end.decisions, made):
        yield f"{name}: decisions {made} without {list(end.decisions)}"
    if end.decisions and end.reason not in (said := "; ".join(decisions[0].get("reasons", []))):
        yield f"{name}: the reason is not about {end.reason!r} but {said!r}"
    looks = [look for look in timeline.looks if look.at >= began]
    if seen := {version for look in looks for version in look.weights} & set(end.never):
        yield f"{name}: versions {seen} had requests of users"
    newest = max((v for look in looks for v in look.weights), key=int)
    if end.shares and not _in_order(end.shares, [look.weights.get(newest, 0) for look in looks]):
        yield f"{name}: version {newest} did not have shares of {list(end.shares)} one after the other"
    for verdict, version in end.decisions[-1:]:
        if not (told := stage.ground.registry.decision(stage.model(name), version)).startswith(verdict):
            yield f"{name}: the tag of version {version} says {told!r} and not {verdict}"


def _in_order(wanted: Any, found: list[Any]) -> bool:
    rest = iter(found)
    return all(one in rest for one in wanted)


def _words(stage: Stage, name: str) -> str:
    look: Look = stage.timelines[name].last
    decisions = look.status.get("decisions", [])
    said = f" ({decisions[0]['version']} {decisions[0]['verdict']})" if decisions else ""
    weights: Mapping[str, int] = look.weights
    shares = " and ".join(f"{v} at {w}%" for v, w in sorted(weights.items()) if w)
    return f"{name + ': ' if len(stage.names) > 1 else ''}{shares}{said}"


def _deployed(timeline: Timeline, began: float) -> float | None:
    before = next((look.deployments for look in reversed(timeline.looks) if look.at < began), frozenset())
    at = timeline.first(lambda look: look.deployments - before, began)
    return at and at - began


def _back(timeline: Timeline, began: float) -> float | None:
    decisions = timeline.last.status.get("decisions", [])
    bad = next((one["version"] for one in decisions if one["verdict"] == "rolled back"), "")
    first = timeline.first(lambda look: bad in look.weights, began) if bad else None
    last = timeline.first(lambda look: look.weights and bad not in look.weights, first) if first else None
    return last - first if first and last else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)
