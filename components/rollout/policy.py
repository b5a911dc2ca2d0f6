"""Whether a challenger becomes champion: a pure function of what was seen. Acting on it is left to the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nvila.components.contracts.recipe.rollout import Policy
from nvila.components.metrics.accuracy import measured

Decision = Literal["promote", "hold", "roll back"]


@dataclass(frozen=True)
class Observation:
    """What one version did with the pinned prompts."""

    trouble: str = ""
    """Why it never got ready; empty when it did."""
    asked: int = 0
    errors: int = 0
    """Requests without an answer."""
    agreed: int = 0
    """Answers equal to the evaluated model's."""
    right: int = 0
    """Answers equal to the true one."""


@dataclass(frozen=True)
class Verdict:
    """A decision and every reason for it."""

    decision: Decision
    reasons: tuple[str, ...]


def decide(challenger: Observation, champion: Observation | None, policy: Policy) -> Verdict:
    """Judge the challenger.

    Roll back when it never got ready, fails or disagrees with its own evaluation too often, or is right clearly less
    often than the champion (95% intervals apart). Hold while too few prompts were asked to say anything. Else promote.

    Args:
        challenger: the new version.
        champion: the version that serves now, on the same prompts; None when none does.
        policy: the recipe's thresholds.
    """
    if challenger.trouble:
        return Verdict("roll back", (f"the new version never got ready: {challenger.trouble}",))
    asked, needed = challenger.asked, policy.pinned_prompts
    if asked < needed or asked == 0:
        return Verdict("hold", (f"{asked} pinned prompts are too few to decide; the policy asks for {needed}",))
    against = []
    errors, agreement = challenger.errors / asked, challenger.agreed / asked
    if errors > policy.max_error_rate:
        against.append(f"{challenger.errors} of {asked} requests failed, more than {policy.max_error_rate:.0%}")
    if agreement < policy.min_agreement:
        same = f"{challenger.agreed} of {asked} answers equal those of the evaluation"
        against.append(f"{same}, less than {policy.min_agreement:.0%}")
    if champion and champion.asked and _clearly_worse(challenger, champion):
        against.append(
            f"{challenger.right} of {asked} answers are right, the champion has {champion.right} of {champion.asked}"
        )
    if against:
        return Verdict("roll back", tuple(against))
    return Verdict("promote", (f"{challenger.agreed} of {asked} answers equal those of the evaluation",))


def _clearly_worse(challenger: Observation, champion: Observation) -> bool:
    mine, other = (measured("accuracy", [i < seen.right for i in range(seen.asked)]) for seen in (challenger, champion))
    return mine.high < other.low
