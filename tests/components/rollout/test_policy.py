"""The rollout's policy, row by row: what was seen, and what becomes of the new version."""

from __future__ import annotations

import pytest

from nvila.components.contracts.recipe.rollout import Policy
from nvila.components.rollout.policy import Asked, Counters, Observation, Window, decide, weight
from nvila.components.serve.counted import read_times

POLICY = Policy(
    pinned_prompts=20, min_agreement=0.75, max_error_rate=0.05, deadline_seconds=300, steps=[10, 50], min_requests=20,
    min_seconds=5, step_deadline_seconds=60, max_first_token_ratio=2, max_token_ratio=2, max_restarts=1,
)  # fmt: skip
GOOD = Asked(asked=20, agreed=20, right=15)
CHAMPION = Observation(pinned=GOOD)


def pinned(**counts: int) -> Observation:
    return Observation(pinned=Asked(**{"asked": 20, "agreed": 20, "right": 15} | counts))


@pytest.mark.parametrize(
    ("seconds", "challenger", "champion", "decision", "reason"),
    [
        (0, Observation(ready=False), None, "hold", "not ready after 0"),
        (299, Observation(ready=False), CHAMPION, "hold", "not ready"),
        (300, Observation(ready=False), CHAMPION, "roll back", "not ready after 300"),
        (9, Observation(ready=False, ended=2, why="no such weights"), None, "roll back", "no such weights"),
        (9, Observation(ready=False, ended=1), None, "hold", "not ready"),
        (9, Observation(ready=False, ended=2), None, "roll back", "ended by itself, 2 times"),
        (9, Observation(), None, "hold", "not been asked"),
        (9, pinned(), None, "promote", "20 of 20"),
        (9, pinned(), CHAMPION, "advance", "20 of 20"),
        (9, pinned(asked=0), None, "roll back", "too few"),
        (9, pinned(asked=19), None, "roll back", "asks for 20"),
        (9, pinned(errors=1, agreed=19), None, "promote", "19 of 20"),
        (9, pinned(errors=2, agreed=18), None, "roll back", "2 of 20 requests failed"),
        (9, pinned(without_value=1), None, "roll back", "infinite or not numbers"),
        (9, pinned(agreed=15), None, "promote", "15 of 20"),
        (9, pinned(agreed=14), None, "roll back", "14 of 20 answers equal"),
        (9, pinned(right=2), Observation(pinned=Asked(asked=20, right=16)), "roll back", "champion has 16"),
        (9, pinned(right=14), Observation(pinned=Asked(asked=20, right=16)), "advance", "20 of 20"),
        (9, pinned(), Observation(pinned=Asked()), "advance", "20 of 20"),
    ],
)
def test_before_users_reach_it(
    seconds: float, challenger: Observation, champion: Observation | None, decision: str, reason: str
) -> None:
    """A wrong row lets users reach a broken model, or keeps a good one from them."""
    verdict = decide(0, seconds, challenger, champion, POLICY)
    assert verdict.decision == decision
    assert any(reason in text for text in verdict.reasons)


FINE = Counters(requests=20, first_tokens=20, first_token_seconds=4.0, tokens=200, token_seconds=4.0)


def saw(**changed: float) -> Observation:
    return Observation(pinned=GOOD, seen=Counters(**{**vars(FINE), **changed}))


@pytest.mark.parametrize(
    ("step", "seconds", "challenger", "champion", "decision", "reason"),
    [
        (1, 5, saw(), saw(), "advance", "20 requests at 10 per cent"),
        (2, 5, saw(), saw(), "promote", "at 50 per cent"),
        (1, 4, saw(), saw(), "hold", "4 of 5 seconds"),
        (1, 59, saw(requests=19), saw(), "hold", "19 requests at 10 per cent are too few"),
        (1, 60, saw(requests=19), saw(), "roll back", "60 seconds have passed"),
        (1, 1, saw(requests=1, errors=1), saw(), "hold", "too few"),  # 19 more may be well
        (1, 1, saw(requests=2, errors=2), saw(), "roll back", "2 of 2 requests failed"),
        (1, 9, saw(requests=100, errors=5), saw(), "advance", "5 failed"),
        (1, 9, saw(requests=100, errors=6), saw(), "roll back", "6 of 100"),
        (1, 9, saw(errors=4), saw(errors=4), "hold", "as many as the champion's"),
        (1, 60, saw(errors=4), saw(errors=4), "roll back", "60 seconds have passed"),
        (1, 9, saw(), Observation(), "advance", "0 failed"),  # nobody asks the champion
        (1, 9, saw(first_token_seconds=9.0), saw(), "roll back", "0.450 s to the first token"),
        (1, 9, saw(first_token_seconds=7.9), saw(), "advance", ""),
        (1, 9, saw(first_token_seconds=0.9), saw(first_token_seconds=0.2), "advance", ""),  # 35 ms are no difference
        (1, 9, saw(token_seconds=9.0), saw(), "roll back", "0.045 s from token to token"),
        (1, 9, saw(first_tokens=19, first_token_seconds=99.0), saw(), "advance", ""),
        (1, 9, saw(requests=99, first_tokens=2, token_seconds=99.0), saw(), "advance", ""),  # two long answers
        (1, 4, saw(first_token_seconds=99.0), saw(), "hold", "4 of 5 seconds"),  # the first ones are slow
        (1, 9, saw(first_token_seconds=99.0), saw(first_tokens=3), "advance", ""),
        (1, 9, Observation(seen=FINE, ended=2), saw(), "roll back", "2 times"),
    ],
)
def test_while_users_reach_it(
    step: int, seconds: float, challenger: Observation, champion: Observation, decision: str, reason: str
) -> None:
    """A slower or failing version that goes on costs users; one that is held for nothing never gets to them."""
    verdict = decide(step, seconds, challenger, champion, POLICY)
    assert verdict.decision == decision, verdict
    assert any(reason in text for text in verdict.reasons)


def test_every_reason_is_told() -> None:
    """Fixing one complaint only to learn of the next costs a whole run."""
    worse = pinned(errors=10, agreed=1, right=1, without_value=3)
    verdict = decide(0, 9, worse, Observation(pinned=Asked(asked=20, right=20)), POLICY)
    assert verdict.decision == "roll back" and len(verdict.reasons) == 4
    slow = saw(first_token_seconds=9.0, token_seconds=9.0)
    assert len(decide(1, 9, slow, saw(), POLICY).reasons) == 2


def test_weights_begin_at_none() -> None:
    """A first step with users would let a broken model answer them."""
    assert [weight(step, POLICY) for step in range(3)] == [0, 10, 50]
    assert decide(0, 9, pinned(), CHAMPION, POLICY.model_copy(update={"steps": []})).decision == "promote"


def test_counters_begin_again_and_replicas_come_and_go() -> None:
    """A server that started anew counts from 0: its errors before were forgotten, or its requests became negative."""
    window = Window().read({"a": Counters(requests=100, errors=9)}).begin()
    assert window.total == Counters()
    window = window.read({"a": Counters(requests=110, errors=10)})
    window = window.read({"a": Counters(requests=3, errors=2), "b": Counters(requests=5)})  # a anew, b has come
    window = window.read({"b": Counters(requests=6)})  # a does not answer
    window = window.read({"a": Counters(requests=4, errors=2), "b": Counters(requests=6)})
    assert window.total == Counters(requests=10 + 3 + 5 + 1 + 1, errors=1 + 2)
    one_shrank = Window(last={"a": Counters(requests=9, errors=5)}).read({"a": Counters(requests=10, errors=1)})
    assert one_shrank.total == Counters(requests=10, errors=1)


METRICS = """# HELP vllm:time_to_first_token_seconds Estimated histogram of time to first token in seconds.
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="m"} 0.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="m"} 3.0
vllm:time_to_first_token_seconds_sum{engine="0",model_name="m"} 1.5
vllm:time_to_first_token_seconds_count{engine="1",model_name="m{} \\"x"} 1.0
vllm:time_to_first_token_seconds_sum{engine="1",model_name="m{} \\"x"} 5e-1
vllm:inter_token_latency_seconds_count{engine="0",model_name="m"} 40.0
vllm:inter_token_latency_seconds_sum{engine="0",model_name="m"} NaN
vllm:inter_token_latency_seconds_created{engine="0",model_name="m"} 1.7e+09
process_cpu_seconds_total 12.0
"""


def test_metrics_are_read() -> None:
    """A name that vLLM changes, or a second engine, would make every version as fast as the other."""
    assert read_times(METRICS) == Counters(first_tokens=4, first_token_seconds=2.0, tokens=40)
    assert read_times("") == Counters()
