from __future__ import annotations

import pytest

from nvila.components.contracts.recipe.rollout import Policy
from nvila.components.rollout.policy import Observation, decide

POLICY = Policy(pinned_prompts=20, min_agreement=0.75, max_error_rate=0.05)
GOOD = Observation(asked=20, agreed=20, right=15)


@pytest.mark.parametrize(
    ("challenger", "champion", "decision", "reason"),
    [
        (GOOD, None, "promote", "20 of 20"),
        (GOOD, GOOD, "promote", "20 of 20"),
        (Observation(trouble="not ready within 300 seconds"), None, "roll back", "not ready within 300 seconds"),
        (Observation(trouble="it died"), GOOD, "roll back", "it died"),
        (Observation(), None, "hold", "too few"),
        (Observation(asked=19, agreed=19, right=19), None, "hold", "asks for 20"),
        (Observation(asked=20, errors=1, agreed=19, right=15), None, "promote", "19 of 20"),
        (Observation(asked=20, errors=2, agreed=18, right=15), None, "roll back", "2 of 20 requests failed"),
        (Observation(asked=20, agreed=15, right=15), None, "promote", "15 of 20"),
        (Observation(asked=20, agreed=14, right=14), None, "roll back", "14 of 20 answers equal"),
        (Observation(asked=20, agreed=20, right=2), Observation(asked=20, right=16), "roll back", "champion has 16"),
        (Observation(asked=20, agreed=20, right=14), Observation(asked=20, right=16), "promote", "20 of 20"),
        (GOOD, Observation(), "promote", "20 of 20"),
    ],
)
def test_policy_table(challenger: Observation, champion: Observation | None, decision: str, reason: str) -> None:
    """A wrong row promotes a broken model or blocks a good one."""
    verdict = decide(challenger, champion, POLICY)
    assert verdict.decision == decision
    assert any(reason in text for text in verdict.reasons)


def test_every_reason_is_told() -> None:
    """Fixing one complaint only to learn of the next costs a whole run."""
    worse = Observation(asked=20, errors=10, agreed=1, right=1)
    verdict = decide(worse, Observation(asked=20, right=20), POLICY)
    assert verdict.decision == "roll back"
    assert len(verdict.reasons) == 3
