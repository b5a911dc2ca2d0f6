"""Whether a new version becomes champion: a pure function of what was seen. Acting on it is left to the targets.

A rollout goes through steps. At step 0 the new version gets no request of users: it has to get ready and to answer the
pinned prompts. Each further step gives it a larger share of the requests (`policy.steps`), and after the last one it is
champion. `decide` is asked again and again; all that it knows is in its arguments:

| at | what is seen | decision |
|---|---|---|
| any | it ended by itself more often than allowed | roll back |
| 0 | not ready | hold, after `deadline_seconds` roll back |
| 0 | pinned prompts not asked | hold |
| 0 | errors, other answers than evaluated, logits without a value, or fewer right ones than the champion | roll back |
| 0 | no champion answers | promote |
| 0 | all well | advance |
| 1 on | more errors than allowed, and more than the champion's share | roll back |
| 1 on | first token or later tokens too slow against the champion, over a whole step | roll back |
| 1 on | too few requests or seconds | hold, after `step_deadline_seconds` roll back |
| 1 on | errors beyond what is allowed on both sides | hold, after `step_deadline_seconds` roll back |
| 1 on | all well | advance, after the last step promote |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from nvila.components.contracts.counters import Counters as Counters
from nvila.components.contracts.counters import Sums
from nvila.components.contracts.counters import Window as Window
from nvila.components.contracts.recipe.rollout import Policy
from nvila.components.metrics.accuracy import measured

Choice = Literal["hold", "advance", "promote", "roll back"]

LEAST_FIRST_TOKEN_SECONDS = 0.05
"""A mean time to the first token that is less than this behind the champion's is no difference."""
LEAST_TOKEN_SECONDS = 0.01
"""The same between tokens."""


@dataclass(frozen=True)
class Asked(Sums):
    """What one version did with the pinned prompts."""

    asked: int = 0
    errors: int = 0
    """Requests without an answer."""
    agreed: int = 0
    """Answers equal to the evaluated model's."""
    right: int = 0
    """Answers equal to the true one."""
    without_value: int = 0
    """Answers some of whose logits are not numbers, or infinite."""


@dataclass(frozen=True)
class Observation:
    """What is known of one version."""

    ready: bool = True
    """Whether it answers."""
    ended: int = 0
    """How often it has ended by itself."""
    why: str = ""
    """How it did so the last time."""
    pinned: Asked | None = None
    """None: not asked yet."""
    seen: Counters = Counters()
    """Since the step began."""


@dataclass(frozen=True)
class Verdict:
    """A decision and every reason for it."""

    decision: Choice
    reasons: tuple[str, ...]


def weight(step: int, policy: Policy) -> int:
    """Per cent of the requests that the new version gets at a step."""
    return (0, *policy.steps)[step]


def decide(step: int, seconds: float, challenger: Observation, champion: Observation | None, policy: Policy) -> Verdict:
    """Judge the new version, by the table above.

    Args:
        step: from 0 to `len(policy.steps)`.
        seconds: since the step began.
        challenger: the new version.
        champion: the version that serves now, on the same prompts and in the same time; None where none does.
        policy: the recipe's thresholds.
    """
    if challenger.ended > policy.max_restarts:
        return Verdict("roll back", (f"the new version ended by itself, {_times(challenger.ended)}: {challenger.why}",))
    if step == 0:
        return _at_start(seconds, challenger, champion, policy)
    return _at_step(step, seconds, challenger, champion or Observation(), policy)


def _at_start(seconds: float, challenger: Observation, champion: Observation | None, policy: Policy) -> Verdict:
    if not challenger.ready:
        late = seconds >= policy.deadline_seconds
        return Verdict("roll back" if late else "hold", (f"the new version is not ready after {seconds:.0f} seconds",))
    if challenger.pinned is None:
        return Verdict("hold", ("the pinned prompts have not been asked yet",))
    if reasons := tuple(against(challenger.pinned, champion.pinned if champion else None, policy)):
        return Verdict("roll back", reasons)
    told = (f"{challenger.pinned.agreed} of {challenger.pinned.asked} answers equal those of the evaluation",)
    return Verdict("promote" if champion is None or not policy.steps else "advance", told)


def against(pinned: Asked, champion: Asked | None, policy: Policy) -> Iterator[str]:
    """All that the pinned prompts say against a version.

    Args:
        pinned: its answers.
        champion: those of the version that serves now.
        policy: the recipe's thresholds.
    """
    asked = pinned.asked
    if asked < policy.pinned_prompts or asked == 0:
        yield f"{asked} pinned prompts are too few to decide; the policy asks for {policy.pinned_prompts}"
        return
    if pinned.errors > policy.max_error_rate * asked:
        yield f"{pinned.errors} of {asked} requests failed, more than {policy.max_error_rate:.0%}"
    if pinned.without_value:
        yield f"{pinned.without_value} of {asked} answers have logits that are infinite or not numbers"
    if pinned.agreed < policy.min_agreement * asked:
        same = f"{pinned.agreed} of {asked} answers equal those of the evaluation"
        yield f"{same}, less than {policy.min_agreement:.0%}"
    if champion and champion.asked and _clearly_worse(pinned, champion):
        yield f"{pinned.right} of {asked} answers are right, the champion has {champion.right} of {champion.asked}"


def _at_step(step: int, seconds: float, challenger: Observation, champion: Observation, policy: Policy) -> Verdict:
    mine, theirs = challenger.seen, champion.seen
    at = f"at {weight(step, policy)} per cent"
    # Before all requests are in, no more errors than all of them may have.
    allowed = policy.max_error_rate * max(mine.requests, policy.min_requests)
    failing = f"{mine.errors} of {mine.requests} requests failed {at}"
    if mine.errors > allowed and mine.error_rate > theirs.error_rate:
        return Verdict("roll back", (f"{failing}, more than {policy.max_error_rate:.0%}",))
    if seconds >= policy.min_seconds and (slow := tuple(_slow(mine, theirs, policy))):
        return Verdict("roll back", slow)
    wants = []
    if mine.errors > allowed:
        wants.append(f"{failing}, as many as the champion's")
    if mine.requests < policy.min_requests:
        wants.append(f"{mine.requests} requests {at} are too few to decide; the policy asks for {policy.min_requests}")
    if wants and seconds >= policy.step_deadline_seconds:
        return Verdict("roll back", (*wants, f"{seconds:.0f} seconds have passed"))
    if seconds < policy.min_seconds:
        wants.append(f"{seconds:.0f} of {policy.min_seconds:.0f} seconds {at} have passed")
    if wants:
        return Verdict("hold", tuple(wants))
    last = step == len(policy.steps)
    return Verdict("promote" if last else "advance", (f"{mine.requests} requests {at}, {mine.errors} failed",))


def _slow(mine: Counters, theirs: Counters, policy: Policy) -> Iterator[str]:
    """What takes too long, once both have answered as many requests as the policy asks for."""
    if min(mine.first_tokens, theirs.first_tokens) < policy.min_requests:
        return
    rows = (
        ("to the first token", "first_token", policy.max_first_token_ratio, LEAST_FIRST_TOKEN_SECONDS),
        ("from token to token", "token", policy.max_token_ratio, LEAST_TOKEN_SECONDS),
    )
    for what, name, most, least in rows:
        counts = [getattr(of, f"{name}s") for of in (mine, theirs)]
        if min(counts) < 1:
            continue
        new, old = (getattr(of, f"{name}_seconds") / n for of, n in zip((mine, theirs), counts, strict=True))
        if new > old * most and new - old > least:
            yield f"{new:.3f} s {what}, more than {most:g} times the champion's {old:.3f} s"


def _clearly_worse(challenger: Asked, champion: Asked) -> bool:
    """Whether the 95% intervals of right answers lie apart."""
    mine, other = (measured("accuracy", [i < seen.right for i in range(seen.asked)]) for seen in (challenger, champion))
    return mine.high < other.low


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
