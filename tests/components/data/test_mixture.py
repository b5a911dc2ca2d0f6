from collections import Counter

import pytest

from nvila.components.data.mixture import draw


def test_passes_say_how_often_each_sample_is_seen() -> None:
    """Prevents a mixture that repeats or drops samples other than the recipe says."""
    order = draw({"a.sft": list(range(10)), "b.sft": list(range(100, 120))}, {"a.sft": 2.5, "b.sft": 0.25}, seed=3)
    counts = Counter(order)
    assert sorted(counts[i] for i in range(10)) == [2] * 5 + [3] * 5
    assert sorted(counts[i] for i in range(100, 120)) == [0] * 15 + [1] * 5


def test_order_depends_on_the_seed_only() -> None:
    """Prevents a resumed stage from seeing other batches than the interrupted one."""
    subsets = {"b.sft": list(range(50, 90)), "a.sft": list(range(40))}
    again = {"a.sft": list(range(40)), "b.sft": list(range(50, 90))}
    passes = {"b.sft": 1.5, "a.sft": 1.0}
    assert draw(subsets, passes, 1) == draw(again, dict(reversed(passes.items())), 1)
    assert draw(subsets, passes, 1) != draw(subsets, passes, 2)


def test_sources_are_mixed() -> None:
    """Prevents a stage that sees one source after the other."""
    order = draw({"a.sft": ["a"] * 100, "b.sft": ["b"] * 100}, {"a.sft": 1, "b.sft": 1}, seed=0)
    assert 30 < order[:100].count("a") < 70


def test_a_subset_that_is_not_there_is_an_error() -> None:
    """Prevents a misspelt subset from being left out silently."""
    with pytest.raises(KeyError):
        draw({"a.sft": [1]}, {"b.sft": 1}, seed=0)
