import math
from pathlib import Path

import pytest

from nvila.components.data.samples import Sample, Turn
from nvila.components.metrics.accuracy import QuestionOnly, accuracy, fall, is_correct


def _sample(number: int, question: str, answer: str, source: str = "s") -> Sample:
    turns = (Turn("human", question), Turn("gpt", answer))
    return Sample(f"{source}/sft/{number}", source, "image", "sft", Path("/"), ("a.png",), turns, question, answer)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [("7", "7", True), (" Yes.", "yes", True), ("17", "7", False), ("", "7", False), ("no", "yes", False)],
)
def test_exact_match_forgives_case_and_full_stop_only(prediction: str, answer: str, right: bool) -> None:
    """Prevents an answer that merely contains the right one from counting."""
    assert is_correct(prediction, answer) is right


def test_interval_solves_the_wilson_equation() -> None:
    """Prevents a wrong interval: its ends are where |p - x| = z sqrt(x(1-x)/n), solved here by bisection."""
    got = accuracy([True] * 37 + [False] * 63)

    def end(low: float, high: float) -> float:
        def excess(x: float) -> float:
            return abs(0.37 - x) - 1.959964 * math.sqrt(x * (1 - x) / 100)

        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if (excess(middle) > 0) == (excess(low) > 0) else (low, middle)
        return low

    assert got["accuracy"] == 0.37
    assert got["low"] == pytest.approx(end(1e-9, 0.37), abs=1e-3)
    assert got["high"] == pytest.approx(end(1 - 1e-9, 0.37), abs=1e-3)


def test_no_questions_prove_nothing() -> None:
    """Prevents a source without questions from passing a gate."""
    assert accuracy([]) == {"accuracy": 0.0, "low": 0.0, "high": 1.0, "n": 0}


def test_fall_is_paired() -> None:
    """Prevents the noise band of two independent samples: the same questions vary together."""
    before = [True] * 80 + [False] * 20
    assert fall(before, before) == (0.0, 0.0)
    lost, noise = fall(before, [False] * 5 + before[5:])
    assert lost == pytest.approx(0.05)
    assert noise == pytest.approx(1.959964 * math.sqrt((0.05 - 0.0025) / 100), abs=1e-6)


def test_question_only_answers_by_question_text_then_majority() -> None:
    """Prevents a baseline weaker than what the question text gives away."""
    train = [_sample(i, "is it red?", "no") for i in range(3)] + [_sample(9, "is it red?", "yes")]
    train += [_sample(20 + i, "what is it?", "circle") for i in range(9)]
    known = QuestionOnly(train)
    assert known.answer(_sample(1, "is it red?", "yes")) == "no"
    assert known.answer(_sample(1, "never asked before?", "yes")) == "circle"
    assert known.majority("unknown source") == ""
