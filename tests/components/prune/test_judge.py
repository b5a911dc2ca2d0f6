"""References are believed where they have proved themselves on held-out questions, kind by kind."""

from __future__ import annotations

import math
import random

import pytest

from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.prune.judge import LEAST_QUESTIONS, Commonest, Heldout, believed, judge


def questions(n: int, small: float, large: float, *, blank: float = 9.0, noise: float = 0.3) -> list[Heldout]:
    choice = random.Random(0)

    def about(nats: float) -> float:
        return max(0.0, nats + choice.gauss(0, noise))

    return [
        Heldout(
            "s",
            "Is it?",
            "yes" if i % 2 else "no",
            {"small": about(small), "large": about(large), "blank": about(blank)},
            {"small": 0.0, "large": 1.0, "blank": 0.0},
        )
        for i in range(n)
    ]


def halves() -> Commonest:
    """Half of the training samples say yes, half no."""
    known = Commonest([("s", "Is it?", answer) for answer in ("yes", "no")])
    known.count([("s", "Is it?", answer) for answer in ("yes", "No.")] * 100)
    return known


@pytest.mark.parametrize(
    ("small", "large", "trusted", "why"),
    [
        (0.65, 0.10, True, ""),
        (0.65, 0.64, False, "the small reference"),
        (0.30, 0.40, False, "the small reference"),
        (2.00, 0.70, False, "the commonest answers"),
    ],
)
def test_a_large_reference_must_beat_the_small_one_and_the_question_alone(
    small: float, large: float, trusted: bool, why: str
) -> None:
    """Of the demonstration's shapes the large reference had learnt colours and nothing else: its scores of yes/no
    questions were noise, and took half of them away."""
    (told,) = judge({"s": questions(200, small, large)}, halves(), "deltaloss").values()
    assert told.trusted is trusted is believed(told, "deltaloss")
    assert why in told.why and bool(told.why) is not trusted
    assert told.loss["question_only"] == pytest.approx(math.log(2), abs=0.02)
    assert told.loss["large"] == pytest.approx(large, abs=0.1)


def test_what_is_within_noise_proves_nothing() -> None:
    """A large reference that is better by chance on a few dozen questions would be believed."""
    (few,) = judge({"s": questions(LEAST_QUESTIONS - 1, 0.6, 0.0)}, halves(), "deltaloss").values()
    assert not few.trusted and "held-out questions" in few.why
    (noisy,) = judge({"s": questions(40, 0.66, 0.6, noise=0.6)}, halves(), "deltaloss").values()
    assert not noisy.trusted


def test_the_gain_is_judged_by_what_it_compares() -> None:
    """The multimodal gain asks one model: a bad small reference must not vouch for it, nor a good one forbid it."""
    (told,) = judge({"s": questions(200, 0.1, 0.2, blank=2.0)}, halves(), "multimodal-gain").values()
    assert told.trusted and not believed(told, "deltaloss")
    (blind,) = judge({"s": questions(200, 2.0, 0.2, blank=0.2)}, halves(), "multimodal-gain").values()
    assert not blind.trusted and believed(blind, "deltaloss")


def test_an_answer_that_was_never_seen_is_no_cheap_guess() -> None:
    """Counted like a common answer, every long caption would be likelier by counting than under any model."""
    known = Commonest(
        [("s", "Describe.", a) for a in ("a picture of another thing altogether", "a picture of thing number 3")]
    )
    known.count([("s", "Describe.", f"a picture of thing number {i}") for i in range(500)])
    assert known.nats("s", "Describe.", "a picture of another thing altogether") > 100
    assert known.nats("s", "Describe.", "a picture of thing number 3") < 10
    assert known.nats("elsewhere", "Who?", "x") > 3


def test_many_answers_do_not_hide_a_common_one() -> None:
    """Answers after the first 10,000 different ones of a source counted as none, so that the question alone looked
    worse than it is; and all captions of one question stood in memory."""
    known = Commonest([("s", "Really?", "yes")])
    known.count(("s", "Describe.", f"thing {i}") for i in range(11_000))
    known.count([("s", "Is it?", "Yes.")] * 11_000)
    assert known.nats("s", "Really?", "yes") == pytest.approx(math.log(2), abs=0.01)
    assert sum(len(count.of) for count in known._by_source.values()) == 1


def test_a_kind_of_which_no_question_can_be_asked_is_not_believed() -> None:
    """Held-out pictures that were gone ended the step with a KeyError, after the references had been trained."""
    (told,) = judge({"s": []}, halves(), "deltaloss").values()
    assert not told.trusted and told.n == 0 and not believed(told, "deltaloss")


def test_references_of_a_compared_method_are_judged_in_its_terms() -> None:
    """`method: random` with `compare: [deltaloss]` ended with a KeyError, after the references had been trained."""
    prune = PruneSettings(method="random", compare=["deltaloss"])
    (told,) = judge({"s": questions(200, 0.65, 0.1)}, halves(), prune.judged_by).values()
    assert told.trusted and believed(told, "deltaloss") and believed(told, "random")
