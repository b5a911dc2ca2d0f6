"""The status of a model on its way through a round: it takes in what is seen, rules change it, it says how it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from nvila.components.contracts.modelrollout import (
    MOST_DECISIONS,
    Answered,
    Condition,
    Counted,
    Decided,
    Phase,
    Seen,
    Served,
    Spec,
    Status,
    Tried,
    Verdict,
    Write,
)
from nvila.components.contracts.recipe.rollout import Policy
from nvila.components.rollout.policy import Asked, Counters, Observation, Window, decide
from nvila.components.rollout.policy import Verdict as Judgement
from nvila.components.tracking.registry import DECISION_TAG
from nvila.infra.controller.seen import Running, Sight
from nvila.infra.controller.times import seconds_since, stamp

_AWAY = "the registry does not answer, so decisions wait"


class State:
    """A status on its way to the next one."""

    def __init__(self, spec: Spec, status: Status, sight: Sight) -> None:
        self.spec, self.sight, self.status = spec, sight, status
        self._untold = bool(status.pending)
        if not status.model:
            self.change(model=spec.model)

    def change(self, **fields: Any) -> None:
        """Other values for these fields of the status."""
        self.status = self.status.model_copy(update=fields)

    @property
    def registry(self) -> bool:
        """Whether the aliases say what people want."""
        return self.sight.aliases is not None and not self.status.pending

    @property
    def waits(self) -> bool:
        """Whether nothing begins or goes on by itself; what people override does."""
        tried = self.status.challenger
        return bool(self.spec.paused or self.blocked) and not (tried and tried.override)

    @property
    def blocked(self) -> str:
        """What people have to do before anything goes on."""
        if self.status.model != self.spec.model:
            return f"spec.model cannot change: {self.status.model} is served here; make another ModelRollout"
        return self.sight.missing

    @property
    def serves(self) -> str:
        """The champion's number."""
        return self.status.champion.version if self.status.champion else ""

    def running(self, version: str) -> Running:
        """The pods of a version."""
        return self.sight.running.get(version, Running())

    def observe(self) -> None:
        """Take in what the pods have done, and whose last requests have had their time."""
        kept = {self.serves, self.status.challenger.version if self.status.challenger else ""}
        leaving = [one for one in self.status.leaving if one.version not in kept]
        if not self.sight.routed:  # their time begins when no more requests come
            leaving = [served(one, since=stamp(self.sight.now)) for one in leaving]
        drain, now = self.spec.policy.drain_seconds, self.sight.now
        staying = [one for one in leaving if not self.sight.routed or seconds_since(one.since, now) < drain]
        if staying != self.status.leaving:
            self.change(leaving=staying)
        if (tried := self.status.challenger) is None:
            return
        new: dict[str, Any] = {"seen": _read(tried.seen, self.running(tried.version))}
        if self.serves:
            new["champion_seen"] = _read(tried.champion_seen, self.running(self.serves))
        if self.waits or self.sight.aliases is None:
            new["step_since"] = stamp(self.sight.now)  # no deadline passes while nobody may decide
        if tried.step == 0:
            new["pinned"] = _answered(self.sight.asked.get(tried.version)) or tried.pinned
            new["champion_pinned"] = _answered(self.sight.asked.get(self.serves)) or tried.champion_pinned
        self.change(challenger=tried.model_copy(update=new))

    @cached_property
    def policy(self) -> Policy:
        """Without a champion there is nobody to be beside."""
        return self.spec.policy if self.serves else self.spec.policy.model_copy(update={"steps": []})

    @cached_property
    def judgement(self) -> Judgement:
        """What the policy says of the version that is tried."""
        tried = self.status.challenger
        assert tried
        mine = self.running(tried.version)
        seconds = seconds_since(tried.step_since, self.sight.now)
        if mine.fatal:
            return Judgement("roll back", (mine.fatal,))
        if tried.override:
            late = seconds >= self.policy.deadline_seconds
            why = (_not_ready(mine, seconds),)
            return Judgement("promote", ()) if mine.ready else Judgement("roll back" if late else "hold", why)
        if tried.step == 0 and mine.ready and self._waits_for_champion:
            return Judgement("hold", ("the champion is asked the pinned prompts, too",))
        found = decide(tried.step, seconds, self._observation(tried), self._champion(tried), self.policy)
        if tried.step == 0 and not mine.ready and mine.ended <= self.policy.max_restarts:
            return Judgement(found.decision, (_not_ready(mine, seconds),))
        return found

    @property
    def _waits_for_champion(self) -> bool:
        tried = self.status.challenger
        return bool(tried and self.serves and self.running(self.serves).ready and tried.champion_pinned is None)

    def _observation(self, tried: Tried) -> Observation:
        mine = self.running(tried.version)
        # Once users ask it, a pod that is not ready is the business of its Service, and of what is counted.
        ready = mine.ready or tried.step > 0
        return Observation(ready, mine.ended, mine.trouble, _asked(tried.pinned), _counters(tried.seen.total))

    def _champion(self, tried: Tried) -> Observation | None:
        if not self.serves:
            return None
        theirs = self.running(self.serves)
        seen = _counters(tried.champion_seen.total)
        return Observation(theirs.ready, 0, "", _asked(tried.champion_pinned), seen)

    @property
    def unapproved(self) -> bool:
        """Whether somebody named in the spec has yet to approve of the version that is tried."""
        tried, approvers = self.status.challenger, self.spec.approvers
        if tried is None or tried.step or tried.override or not approvers:
            return False
        known = self.sight.versions.get(tried.version)
        return known is None or known.approved_by not in approvers

    def decided(self, verdict: Verdict, version: str, reasons: Sequence[str], *writes: Write) -> None:
        """Put a decision down, with what the registry is to be told."""
        tried = self.status.challenger
        numbers: dict[str, Any] = {}
        if tried and tried.version == version:
            numbers = {"step": tried.step, "weight": self.status.weight, "pinned": tried.pinned}
            numbers |= {"counted": tried.seen.total, "champion_counted": tried.champion_seen.total}
        made = Decided(
            at=stamp(self.sight.now),
            verdict=verdict,
            version=version,
            instead_of=self.serves,
            reasons=[*reasons],
            **numbers,
        )
        text = f"{verdict}: {'; '.join(reasons)}" if reasons else verdict
        tag = Write(tag=DECISION_TAG, version=version, text=text)
        self.change(
            decisions=[made, *self.status.decisions][:MOST_DECISIONS],
            pending=[*self.status.pending, *writes, tag],
        )

    def drop(self) -> None:
        """The version that is tried gets no more requests, and goes."""
        tried = self.status.challenger
        assert tried
        leaving = self.status.leaving
        if self.status.weight:
            leaving = [*leaving, served(tried, since=stamp(self.sight.now))]
        self.change(challenger=None, weight=0, leaving=leaving)

    def begin(self, version: str, digest: str, *, override: bool = False) -> None:
        """Try a version, from step 0 on."""
        now = stamp(self.sight.now)
        self.change(
            challenger=Tried(version=version, digest=digest, since=now, step_since=now, override=override),
            leaving=[one for one in self.status.leaving if one.version != version],
            weight=0,
        )

    def questions(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Who is to be asked all pinned prompts, and who one of them."""
        tried = self.status.challenger
        if tried is None or tried.override:
            return (), ()
        there = tuple(v for v in (tried.version, self.serves) if v and self.running(v).ready)
        if tried.step == 0:
            answered = {tried.version: tried.pinned, self.serves: tried.champion_pinned}
            return (tuple(v for v in there if answered[v] is None) if tried.version in there else ()), ()
        return (), there if tried.seen.total.requests < self.policy.min_requests else ()

    def describe(self) -> None:
        """Say where it stands."""
        tried, steps = self.status.challenger, len(self.spec.policy.steps)
        phase, message = self._story()
        step, steps = (tried.step, steps) if tried else (0, 0)
        self.change(phase=phase, message=message, step=step, steps=steps, conditions=self._conditions(phase, message))

    def _conditions(self, phase: Phase, message: str) -> list[Condition]:
        theirs, before = self.running(self.serves), {one.type: one for one in self.status.conditions}
        answers, away = bool(self.serves) and any(pod.ready for pod in theirs.pods), self.sight.aliases is None
        tried = self.status.challenger is not None
        why = theirs.trouble or ("no pod is ready" if self.serves else "nothing is served")
        rows: tuple[tuple[Any, bool, str, str], ...] = (
            ("Ready", answers, "Serves" if answers else "Down", "" if answers else why),
            ("RegistryReachable", not away, "Away" if away else "Answers", _AWAY if away else ""),
            ("Progressing", tried and not self.waits, phase, message if tried else ""),
        )
        made = []
        for kind, true, reason, text in rows:
            status: Literal["True", "False"] = "True" if true else "False"
            old = before.get(kind)
            since = old.last_transition_time if old and old.status == status else stamp(self.sight.now)
            made.append(Condition(type=kind, status=status, reason=reason, message=text, last_transition_time=since))
        return made

    def _story(self) -> tuple[Phase, str]:
        tried = self.status.challenger
        held = ["paused"] if self.spec.paused else []
        if self.sight.aliases is None:
            held.append(_AWAY)
        elif self._untold:
            held.append("the registry has not taken what was decided, so decisions wait")
        if self.blocked:
            return "Blocked", self.blocked
        if tried is None:
            said = f"version {self.serves} serves" if self.serves else "nothing is served"
            last = next((one for one in self.status.decisions if one.verdict in ("rolled back", "refused")), None)
            if last and last is self.status.decisions[0]:
                said += f"; version {last.version} was {last.verdict}: {'; '.join(last.reasons)}"
            return "Serving" if self.serves else "Empty", "; ".join([*held, said])
        if self.unapproved and self.judgement.decision in ("advance", "promote"):
            held.append(f"it waits until its tag nvila.approved-by names one of {', '.join(self.spec.approvers)}")
        said = "; ".join([*held, f"version {tried.version}", *self.judgement.reasons])
        if tried.step:
            return "Shifting", said
        asks = self.running(tried.version).ready and not tried.override
        return "Asking" if asks else "Preparing", said


def _not_ready(running: Running, seconds: float) -> str:
    said = f"{sum(pod.ready for pod in running.pods)} of {running.wanted} pods are ready after {seconds:.0f} seconds"
    return f"{said}: {running.trouble}" if running.trouble else said


def served(version: Served, since: str) -> Served:
    """The version, as it is from then on."""
    return Served(version=version.version, digest=version.digest, since=since)


def _read(seen: Seen, running: Running) -> Seen:
    """With what the pods say now."""
    window = Window(_counters(seen.total), {pod: _counters(counted) for pod, counted in seen.last.items()})
    now = window.read(running.counted)
    there = {pod.name for pod in running.pods}
    last = {pod: _counted(counters) for pod, counters in now.last.items() if pod in there}
    return Seen(total=_counted(now.total), last=last)


def _counters(counted: Counted) -> Counters:
    return Counters(**counted.model_dump())


def _counted(counters: Counters) -> Counted:
    return Counted(**vars(counters))


def _asked(answered: Answered | None) -> Asked | None:
    return Asked(**answered.model_dump()) if answered else None


def _answered(asked: Asked | None) -> Answered | None:
    return Answered(**vars(asked)) if asked else None
