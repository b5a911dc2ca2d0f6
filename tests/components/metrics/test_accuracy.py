import math
from pathlib import Path

import pytest

from nvila.components.contracts.results.result import Measured
from nvila.components.data.samples import Sample, Turn
from nvila.components.metrics.accuracy import QuestionOnly, fall, is_correct, measured


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
    got = measured("accuracy", [True] * 37 + [False] * 63)

    def end(low: float, high: float) -> float:
        def excess(x: float) -> float:
            return abs(0.37 - x) - 1.959964 * math.sqrt(x * (1 - x) / 100)

        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if (excess(middle) > 0) == (excess(low) > 0) else (low, middle)
        return low

    assert got.value == 0.37
    assert got.low == pytest.approx(end(1e-9, 0.37), abs=1e-3)
    assert got.high == pytest.approx(end(1 - 1e-9, 0.37), abs=1e-3)


def test_no_questions_prove_nothing() -> None:
    """Prevents a source without questions from passing a gate."""
    assert measured("accuracy", []) == Measured(metric="accuracy", value=0.0, low=0.0, high=1.0, n=0)


def _fall(lost: int, won: int, n: int) -> tuple[float, float]:
    before = [True] * lost + [False] * won + [True] * (n - lost - won)
    return fall(before, [False] * lost + [True] * won + [True] * (n - lost - won))


def test_fall_is_paired() -> None:
    """Prevents the noise band of two independent samples: the same questions vary together."""
    lost, noise = _fall(5, 0, 1000)
    assert lost == pytest.approx(0.005)
    assert 0.004 < noise < 0.01  # two samples of 1000 would give 0.02 and more


@pytest.mark.parametrize(
    ("lost", "won", "n", "at_most"), [(0, 0, 1200, 0.005), (5, 5, 1200, 0.008), (75, 75, 3000, 0.009)]
)
def test_agreement_says_something_but_not_everything(lost: int, won: int, n: int, at_most: float) -> None:
    """Without a pair that differs the old interval was empty; and a good model of `tiny` must still pass."""
    assert 0 < _fall(lost, won, n)[1] <= at_most
    assert _fall(0, 0, 10)[1] > 0.3


def test_no_questions_leave_every_fall_possible() -> None:
    """It was a division by zero."""
    assert fall([], []) == (0.0, 1.0)


def test_everything_can_be_lost() -> None:
    """The interval ends where a fall can end."""
    assert sum(_fall(10, 0, 10)) == pytest.approx(1.0)


@pytest.mark.parametrize("n", [3, 10, 30])
def test_a_true_fall_is_rarely_above_the_interval(n: int) -> None:
    """Too narrow at small n is what lets a harmed model pass. Every outcome is counted, so this is no simulation."""
    ends = {(b, c): sum(_fall(b, c, n)) for b in range(n + 1) for c in range(n + 1 - b)}
    ways = {(b, c): math.comb(n, b) * math.comb(n - b, c) for b, c in ends}
    for p in (0.003, 0.02, 0.1, 0.3, 0.6, 0.9):
        for q in (0.0, 0.001, 0.01, 0.1, 0.4):
            if p + q <= 1:
                held = sum(
                    ways[b, c] * p**b * q**c * (1 - p - q) ** (n - b - c)
                    for (b, c), end in ends.items()
                    if end >= p - q - 1e-9
                )
                assert held > 0.97, (p, q, held)


@pytest.mark.parametrize(
    ("one", "other"),
    [("caf\u00e9", "cafe\u0301"), ("\u212b", "\u00e5"), ("<\u200bimage>", "<image>"), ("\u200b7 ", "7")],
)
def test_one_text_has_one_form(one: str, other: str) -> None:
    """Unicode has two spellings of the same sign, and a guarded control string is still the same answer."""
    assert is_correct(one, other) and is_correct(other, one)


def test_the_baseline_counts_spellings_together() -> None:
    """Split votes make the baseline weaker than it is, and the gate easier."""
    train = [_sample(1, "caf\u00e9?", "Yes."), _sample(2, "cafe\u0301?", "yes"), _sample(3, "cafe\u0301?", "no")]
    train += [_sample(4, "caf\u00e9?", "no "), _sample(5, "caf\u00e9?", "YES")]
    known = QuestionOnly(train)
    assert is_correct(known.answer(_sample(6, "caf\u00e9?", "")), "yes")
    assert is_correct(known.majority("s"), "yes")


def test_question_only_answers_by_question_text_then_majority() -> None:
    """Prevents a baseline weaker than what the question text gives away."""
    train = [_sample(i, "is it red?", "no") for i in range(3)] + [_sample(9, "is it red?", "yes")]
    train += [_sample(20 + i, "what is it?", "circle") for i in range(9)]
    known = QuestionOnly(train)
    assert known.answer(_sample(1, "is it red?", "yes")) == "no"
    assert known.answer(_sample(1, "never asked before?", "yes")) == "circle"
    assert known.majority("unknown source") == ""


def test_an_interval_of_shares_is_wide_enough() -> None:
    """A metric may give part of a point: an interval narrower than its mean's spread would make gates lie."""
    shares = [0.0, 0.25, 0.5, 0.75, 1.0] * 8
    found, binary = measured("accuracy", shares), measured("accuracy", [True, False] * 20)
    spread = math.sqrt(sum((share - 0.5) ** 2 for share in shares)) / len(shares)
    assert found == binary and found.high - found.value > 1.96 * spread
    lost, noise = fall(shares, [share / 2 for share in shares])
    assert lost == pytest.approx(0.25) and noise > 0
