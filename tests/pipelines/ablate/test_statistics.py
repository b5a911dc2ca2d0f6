"""Means, spreads and verdicts of the ablation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.pipelines.ablate.statistics import LEVEL, Comparison, compare, holm, summary, verdict

SEEDS, QUESTIONS = 3, 200


def _answers(rng: np.random.Generator, means: list[float], questions: int = QUESTIONS) -> np.ndarray:
    """Right or wrong, for one model per mean."""
    return (rng.random((len(means), questions)) < np.array(means)[:, None]).astype(float)


def test_mean_and_spread_are_over_seeds() -> None:
    """A spread over questions would make three seeds look as sure as hundreds."""
    told = summary(np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    assert (told.mean, told.seeds, told.n) == (0.75, (0.5, 1.0), 4)
    assert told.spread == pytest.approx(math.sqrt(0.125))


@pytest.mark.parametrize(
    ("method", "random", "verdict_", "why"),
    [
        ([0.9, 0.9, 0.9], [0.5, 0.5, 0.5], "better", "a large gain with every seed"),
        ([0.5, 0.5, 0.5], [0.9, 0.9, 0.9], "below", "a large loss with every seed"),
        ([0.9, 0.9, 0.9], [0.9, 0.9, 0.9], "no difference beyond noise", "the same model"),
        ([0.9, 0.9, 0.9], [0.98, 0.36, 0.9], "no difference beyond noise", "chance that fails with one seed"),
        ([0.9], [0.1], "not tested", "one seed"),
    ],
)
def test_verdicts(method: list[float], random: list[float], verdict_: str, why: str) -> None:
    """What is called better must be so with other seeds too: random subsets can end anywhere."""
    rng = np.random.default_rng(0)
    one = compare(_answers(rng, method), _answers(rng, random))
    assert verdict(one, one.p, one.p) == verdict_, (why, one)


def test_a_method_equal_to_chance_is_called_different_no_more_often_than_the_level_says() -> None:
    """A test that forgets the seeds calls the luck of one training a better method: models of one method differ."""
    rng, found, trials = np.random.default_rng(1), 0, 2000
    for _ in range(trials):
        means = np.clip(rng.normal(0.7, 0.06, 2 * SEEDS), 0, 1)  # each training ends elsewhere
        difficulty = rng.normal(0, 0.15, QUESTIONS)  # and some questions are harder for all
        worth = (rng.random((2 * SEEDS, QUESTIONS)) < means[:, None] + difficulty).astype(float)
        p = compare(worth[:SEEDS], worth[SEEDS:]).p
        found += p is not None and p < LEVEL
    assert found / trials < LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / trials)


def test_a_true_difference_is_found() -> None:
    """A test that never finds anything would hold the level as well."""
    rng, found, trials = np.random.default_rng(2), 0, 200
    for _ in range(trials):
        means = rng.normal(0, 0.01, 2 * SEEDS)
        p = compare(_answers(rng, list(0.85 + means[:SEEDS])), _answers(rng, list(0.65 + means[SEEDS:]))).p
        found += p is not None and p < LEVEL
    assert found / trials > 0.9


def test_few_questions_that_all_differ_are_no_proof() -> None:
    """Without a floor the variance of two questions with one outcome is 0, and p as well."""
    p = compare(np.ones((2, 2)), np.zeros((2, 2))).p
    assert p is not None and p > 0.01


_WORTH = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        *(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=n, max_size=n), min_size=3, max_size=3),) * 2
    )
)


@settings(deadline=None)
@given(_WORTH)
def test_the_test_is_even_handed(pair: tuple[list[list[float]], list[list[float]]]) -> None:
    """Which of the two is called the baseline must decide nothing but the sign."""
    a, b = map(np.array, pair)
    there, back = compare(a, b), compare(b, a)
    assert there.difference == pytest.approx(-back.difference)
    assert there.p == pytest.approx(back.p) and there.p is not None and 0 <= there.p <= 1


@given(st.dictionaries(st.integers(), st.floats(0, 1), min_size=1))
def test_holm_only_makes_p_larger_and_keeps_the_order(p: dict[int, float]) -> None:
    """A correction that shrinks a p, or lets a weaker one pass before a stronger, finds what is not there."""
    corrected = holm(p)
    assert all(p[key] <= corrected[key] <= min(1.0, len(p) * 1.0) for key in p)
    order = sorted(p, key=lambda key: p[key])
    assert [corrected[key] for key in order] == sorted(corrected.values())
    assert corrected[order[0]] == min(1.0, len(p) * p[order[0]])


def test_holm_by_the_table() -> None:
    """The step-down factors are m, m-1, ...; Bonferroni's alone would lose true findings."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_gain_and_harm_are_judged_by_their_own_correction() -> None:
    """Many comparisons must not hide that a method harms, nor make a gain of chance."""
    loss, gain = Comparison(-0.1, 0.02, 0.01), Comparison(0.1, 0.02, 0.01)
    assert verdict(loss, 0.2, 0.04) == "below"
    assert verdict(gain, 0.2, 0.04) == "no difference beyond noise"
