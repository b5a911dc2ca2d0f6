"""What becomes of a model in a round: a pure function of spec, status and what was seen. Acting on it is the loop's.

`RULES` is the whole state machine: the first rule that applies changes the status, and the round is over. What runs and
who gets how many requests follows from the status alone, so any round may be repeated, or end anywhere. What the
registry is to say is put down in the status (`pending`) together with the decision, and written until it is there;
meanwhile its aliases are not read for what people want.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from nvila.components.contracts.modelrollout import Phase, Seen, Spec, Status, Verdict, Write
from nvila.components.rollout.policy import weight
from nvila.components.tracking.registry import CHALLENGER, CHAMPION, PREVIOUS
from nvila.infra.controller.seen import Sight
from nvila.infra.controller.state import State, served
from nvila.infra.controller.times import stamp


@dataclass(frozen=True)
class Round:
    """What a round comes to."""

    status: Status
    rule: str = ""
    """The rule that applied."""
    ask_all: tuple[str, ...] = ()
    """Versions that are to answer all pinned prompts."""
    ask_one: tuple[str, ...] = ()
    """Versions that are to answer one, as users ask too few questions."""


class Rule(NamedTuple):
    """A way from one state to another."""

    name: str
    before: tuple[Phase, ...]
    """Phases in which it can apply, for people; none: in any."""
    after: Phase | None
    """The phase that it leads to; None: it stays as it is."""
    when: str
    then: str
    apply: Callable[[State], bool]
    registry: bool = True
    """Whether it waits while the registry is away, or has not yet been told of the last decision."""
    paused: bool = False
    """Whether it applies while the ModelRollout is paused or blocked, too."""


def decide(spec: Spec, status: Status, sight: Sight) -> Round:
    """One round of one model.

    Args:
        spec: what people decide.
        status: what the last round has left.
        sight: what was seen of the registry and the cluster.
    """
    state = State(spec, status, sight)
    state.observe()
    applied = ""
    for rule in RULES:
        if rule.registry and not state.registry:
            continue
        if not rule.paused and state.waits:
            continue
        if rule.apply(state):
            applied = rule.name
            break
    asked = state.questions()
    state.describe()
    return Round(state.status, applied, *asked)


def _rolls_back(state: State) -> bool:
    tried = state.status.challenger
    if tried is None or state.judgement.decision != "roll back":
        return False
    writes = [Write(alias=CHALLENGER, expects=tried.version)]
    if not state.serves:
        writes.append(Write(alias=CHAMPION, expects=tried.version))  # which may name it from before anything served
    verdict: Verdict = "refused" if tried.override else "rolled back"
    state.decided(verdict, tried.version, state.judgement.reasons, *writes)
    if tried.override:
        state.change(overridden=state.spec.override)
    state.drop()
    return True


def _is_overridden(state: State) -> bool:
    wanted, tried = state.spec.override, state.status.challenger
    if tried and tried.override:
        if wanted and wanted.version == tried.version:
            return False
        return _gives_way(
            state, "spec.override wants another version by now" if wanted else "spec.override was removed"
        )
    if wanted is None or wanted == state.status.overridden:
        return False
    if tried:
        return _gives_way(state, f"spec.override wants version {wanted.version} now: {wanted.reason}")
    if wanted.version != state.serves:
        before, known = state.status.previous, state.sight.versions.get(wanted.version)
        digest = before.digest if before and before.version == wanted.version else known.digest if known else ""
        if digest:
            state.begin(wanted.version, digest, override=True)
            return True
        if state.sight.aliases is None:
            return False
        state.decided("refused", wanted.version, (_UNKNOWN,))
    state.change(overridden=wanted)
    return True


def _gives_way(state: State, reason: str) -> bool:
    tried = state.status.challenger
    assert tried
    state.decided("withdrawn", tried.version, (reason,), Write(alias=CHALLENGER, expects=tried.version))
    state.drop()
    return True


_UNKNOWN = "no run of this platform registered it: it has no digest that its files could be held against"


def _is_withdrawn(state: State) -> bool:
    tried, aliases = state.status.challenger, state.sight.aliases
    if tried is None or tried.override or aliases is None or aliases.challenger == tried.version:
        return False
    now = f"names version {aliases.challenger} now" if aliases.challenger else "was removed"
    state.decided("withdrawn", tried.version, (f"the alias challenger {now}",))
    state.drop()
    return True


def _was_moved(state: State) -> bool:
    aliases = state.sight.aliases
    assert aliases
    asked = aliases.champion
    if not asked or asked == state.serves or (not state.serves and aliases.challenger):
        return False
    known = state.sight.versions.get(asked)
    who = f" (registered by {known.user})" if known and known.user else ""
    reason = f"the alias champion was moved to it by hand{who}; it is tried like any other"
    back = [Write(alias=CHAMPION, version=state.serves, expects=asked)] if state.serves else []
    state.decided("requested", asked, (reason,), Write(alias=CHALLENGER, version=asked), *back)
    return True


def _is_gone(state: State) -> bool:
    aliases = state.sight.aliases
    assert aliases
    if aliases.champion or not state.serves:
        return False
    again = Write(alias=CHAMPION, version=state.serves, expects="")
    state.decided("put back", state.serves, ("the alias champion was removed by hand; it serves",), again)
    return True


def _serves_already(state: State) -> bool:
    aliases = state.sight.aliases
    assert aliases
    if state.status.challenger or not state.serves or aliases.challenger != state.serves:
        return False
    gone = Write(alias=CHALLENGER, expects=state.serves)
    state.decided("promoted", state.serves, ("it serves already",), gone)
    return True


def _is_unknown(state: State) -> bool:
    aliases = state.sight.aliases
    assert aliases
    wanted = aliases.challenger
    if state.status.challenger or not wanted:
        return False
    known = state.sight.versions.get(wanted)
    if known and known.digest:
        return False
    state.decided("refused", wanted, (_UNKNOWN,), Write(alias=CHALLENGER, expects=wanted))
    return True


def _begins(state: State) -> bool:
    aliases = state.sight.aliases
    assert aliases
    if state.status.challenger or not aliases.challenger:
        return False
    state.begin(aliases.challenger, state.sight.versions[aliases.challenger].digest)
    return True


def _advances(state: State) -> bool:
    tried = state.status.challenger
    if tried is None or state.unapproved or state.judgement.decision != "advance":
        return False
    moved = tried.model_copy(
        update={
            "step": tried.step + 1,
            "step_since": stamp(state.sight.now),
            "seen": Seen(last=tried.seen.last),
            "champion_seen": Seen(last=tried.champion_seen.last),
            "reasons": [*tried.reasons, "; ".join(state.judgement.reasons)],
        }
    )
    state.change(challenger=moved, weight=weight(moved.step, state.policy))
    del state.judgement
    return True


def _is_promoted(state: State, override: bool = False) -> bool:
    tried, old = state.status.challenger, state.status.champion
    if tried is None or tried.override != override or state.unapproved or state.judgement.decision != "promote":
        return False
    # Before anything served, the alias may have named any version.
    writes = [Write(alias=CHAMPION, version=tried.version, expects=state.serves or None)]
    if old:
        writes.append(Write(alias=PREVIOUS, version=old.version))
    writes.append(Write(alias=CHALLENGER, expects=tried.version))
    reasons = [*tried.reasons, "; ".join(state.judgement.reasons)]
    if override and state.spec.override:
        reasons = [state.spec.override.reason]
        state.change(overridden=state.spec.override)
    state.decided("overridden" if override else "promoted", tried.version, reasons, *writes)
    now = stamp(state.sight.now)
    state.change(
        champion=served(tried, since=now),
        previous=old or state.status.previous,
        challenger=None,
        weight=0,
        leaving=[*state.status.leaving, *([served(old, since=now)] if old else [])],
    )
    return True


_TRYING: tuple[Phase, ...] = ("Preparing", "Asking", "Shifting")

RULES: tuple[Rule, ...] = (
    Rule(
        "roll back",
        _TRYING,
        "Serving",
        "the policy says so, its pods do not get ready in time, or its files are not the registered ones",
        "it gets no more requests in this very round, and loses the alias `challenger`",
        _rolls_back,
        registry=False,
        paused=True,
    ),
    Rule(
        "override",
        (),
        "Preparing",
        "`spec.override` is another one than the last that was acted on",
        "what is tried is withdrawn; then the version's pods start, and it takes over as soon as they are ready",
        _is_overridden,
        registry=False,
        paused=True,
    ),
    Rule(
        "withdraw",
        _TRYING,
        "Serving",
        "the alias `challenger` was removed or names another version",
        "it gets no more requests; another version begins from step 0 in the next round",
        _is_withdrawn,
        paused=True,
    ),
    Rule(
        "request",
        (),
        None,
        "the alias `champion` was moved by hand",
        "it is put back on what serves, and `challenger` names that version",
        _was_moved,
        paused=True,
    ),
    Rule(
        "put back",
        ("Serving", *_TRYING),
        None,
        "the alias `champion` was removed by hand",
        "it names again what serves",
        _is_gone,
        paused=True,
    ),
    Rule(
        "serves already",
        ("Serving",),
        None,
        "`challenger` names what serves",
        "the alias goes",
        _serves_already,
        paused=True,
    ),
    Rule(
        "refuse",
        ("Empty", "Serving"),
        None,
        "the version has no digest, so no run of ours registered it",
        "the alias `challenger` goes",
        _is_unknown,
        paused=True,
    ),
    Rule(
        "begin",
        ("Empty", "Serving"),
        "Preparing",
        "`challenger` names a version",
        "its pods start, at weight 0",
        _begins,
    ),
    Rule(
        "advance",
        _TRYING,
        "Shifting",
        "the policy lets it go on, and an approver has said yes where any is named",
        "the next step, with its share of the requests",
        _advances,
    ),
    Rule(
        "promote",
        _TRYING,
        "Serving",
        "the policy lets it go on after the last step, or nothing else serves",
        "all requests are its own; `champion` names it, `previous` the old one, whose pods drain and go",
        _is_promoted,
    ),
    Rule(
        "take over",
        ("Preparing",),
        "Serving",
        "the pods of an override's version are ready",
        "as in a promotion",
        partial(_is_promoted, override=True),
        registry=False,
        paused=True,
    ),
)
"""In the order in which they are tried."""
