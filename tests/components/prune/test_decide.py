"""Methods are scores, and one rule selects; what is not believed stays whole or is chosen by chance."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.prune.decide import CATEGORIES, Columns, categories, decide, random_scores
from nvila.components.prune.table import Table, plot


def columns(n: int = 40, **more: Any) -> Columns:
    """Two groups of one source, each of a kind of its own; DeltaLoss rises with the place."""
    small = np.arange(n, dtype=np.float64)
    return Columns(
        ties=np.random.default_rng(0).integers(0, 2**63, n).astype(np.uint64),
        source=np.zeros(n, np.int32),
        group=(np.arange(n) % 2).astype(np.int32),
        kind=(np.arange(n) % 2).astype(np.int32),
        sources=["s"],
        groups=["s / a", "s / b"],
        kinds=["s / a", "s / b"],
        loss={"small": small, "large": np.zeros(n), "blank": small[::-1].copy()},
        tokens={name: np.ones(n, np.int32) for name in ("small", "large", "blank")},
        **more,
    )


def settings(**prune: Any) -> PruneSettings:
    return PruneSettings.model_validate({"keep_ratio": 0.25} | prune)


def test_groups_that_are_not_believed_stay_whole_or_are_chosen_by_chance() -> None:
    """Scores of a reference that has learnt nothing threw away what the model needed."""
    known = columns()
    whole = decide(known, {"s / a"}, settings(), seed=0)
    assert whole.kept[1::2].all() and np.flatnonzero(whole.kept[::2]).tolist() == [15, 16, 17, 18, 19]
    assert whole.ranked_by == ["deltaloss", "none"]
    chance = decide(known, {"s / a"}, settings(untrusted="random"), seed=0)
    assert chance.kept[1::2].sum() == 5 and chance.ranked_by == ["deltaloss", "random"]
    assert np.flatnonzero(chance.kept[1::2]).tolist() != [15, 16, 17, 18, 19]
    assert (chance.kept[::2] == whole.kept[::2]).all()


def test_a_group_of_several_kinds_is_parted_where_one_is_not_believed() -> None:
    """Ranked together, noise scores of one kind would push out the sound ones of the other."""
    known = columns()
    known.group, known.groups = np.zeros(40, np.int32), ["s"]
    found = decide(known, {"s / b"}, settings(), seed=0)
    assert sorted(found.units) == ["s", "s [s / a]"]
    assert found.kept[::2].all() and np.flatnonzero(found.kept[1::2]).tolist() == [15, 16, 17, 18, 19]


@pytest.mark.parametrize("method", ["deltaloss", "multimodal-gain"])
def test_a_sample_without_a_loss_does_not_stay(method: str) -> None:
    """With a score of 0 a damaged picture would be kept before distracting samples."""
    known = columns(usable=np.arange(40) != 38)
    for losses in known.loss.values():
        losses[38] = np.nan
    found = decide(known, {"s / a", "s / b"}, settings(method=method), seed=0)
    assert not found.kept[38] and found.kept.sum() == 10


def test_the_gain_is_the_loss_without_the_picture_less_that_with_it() -> None:
    """The wrong sign keeps exactly what the picture does not matter for."""
    found = decide(columns(), {"s / a", "s / b"}, settings(method="multimodal-gain"), seed=0)
    assert np.flatnonzero(found.kept).tolist() == list(range(10))


def test_clusters_are_kept_evenly() -> None:
    """A big cluster of look-alikes would fill the subset; small ones give all they have."""
    known = columns(cluster=np.array([0] * 30 + [1] * 6 + [2] * 4, np.int32))
    known.group, known.groups = np.zeros(40, np.int32), ["s"]
    found = decide(known, (), settings(method="clusters", keep_ratio=0.5), seed=0)
    counts = np.bincount(known.cluster[found.kept])
    assert found.kept.sum() == 20 and counts[1] == 6 and counts[2] == 4
    other = decide(known, (), settings(method="clusters", keep_ratio=0.5), seed=1)
    assert (found.kept != other.kept).any()


def test_chance_depends_on_ids_and_seed_alone() -> None:
    """A random baseline that is drawn in the order of rows is another one after a record was added."""
    known = columns()
    first = decide(known, (), settings(method="random"), seed=1).kept
    assert first[::2].sum() == 5 and (first == decide(known, (), settings(method="random"), seed=1).kept).all()
    assert (first != decide(known, (), settings(method="random"), seed=2).kept).any()
    values = random_scores(np.arange(100_000, dtype=np.uint64), 3)
    assert abs(values.mean() - 0.5) < 0.005 and values.min() >= 0 and values.max() < 1


def test_none_keeps_everything() -> None:
    """A recipe that switches pruning off must not lose samples to a ratio that is still there."""
    assert decide(columns(), (), settings(method="none"), seed=0).kept.all()


def test_a_source_has_its_own_ratio() -> None:
    """Prevents `keep_ratio_of` from being ignored."""
    found = decide(columns(), {"s / a", "s / b"}, settings(keep_ratio_of={"s": 1.0}), seed=0)
    assert found.kept.all()


def test_categories_are_those_of_the_paper() -> None:
    """Swapped, the report would call distracting samples informative."""
    known = columns(4)
    known.loss = {"small": np.array([0.1, 3.0, 0.5, 2.0]), "large": np.array([0.1, 3.0, 2.0, 0.5])}
    assert [CATEGORIES[place] for place in categories(known)] == list(CATEGORIES)
    known.loss["large"][0] = np.nan
    assert categories(known)[0] == -1


def test_what_was_not_worked_out_is_null(tmp_path: Any) -> None:
    """An answer of 0 tokens and a cluster -1 stood in the table where no one had looked."""
    import pyarrow
    import pyarrow.parquet as parquet

    known = Table(columns(cluster=np.full(40, -1, np.int32)))
    known.columns.loss["large"][3], known.columns.tokens["large"][3] = np.nan, 0
    known.decide({"s / a"}, settings(), seed=0)
    ids = pyarrow.table({"id": [str(i) for i in range(40)], "source": ["s"] * 40, "answer": ["yes"] * 40})
    known.columns.tokens.pop("blank")
    known.write([ids], tmp_path / "scores.parquet")
    row = parquet.read_table(tmp_path / "scores.parquet").to_pylist()[3]
    assert (row["answer_kind"], row["answer_characters"]) == ("yes/no", 3)
    assert row["tokens_large"] is row["cluster"] is row["loss_large"] is None and row["tokens_small"] == 1


def test_many_groups_are_told_as_fast_as_few() -> None:
    """All samples were looked at once more for each group: many samples in many groups took hours."""
    n = 200_000
    known = Table(columns(n))
    known.columns.group = (np.arange(n) // 10).astype(np.int32)
    known.columns.groups = [f"s / {number:05d}" for number in range(n // 10)]
    known.columns.kind, known.columns.kinds = np.zeros(n, np.int32), ["s"]
    known.decide({"s"}, settings(), seed=0)
    began = time.monotonic()
    found = known.groups()
    assert time.monotonic() - began < 10
    assert found["s / 00007"].n == 10 and found["s / 00007"].kept == 3 and found["s / 00007"].mean_score == 74.5


def test_many_sources_are_drawn(tmp_path: Any) -> None:
    """Side by side, the histograms of 170 sources were wider than a picture can be: the step failed after its work."""
    known = columns(170 * 2)
    known.source, known.sources = (np.arange(340) // 2).astype(np.int32), [f"s{number}" for number in range(170)]
    table = Table(known)
    table.decide({"s / a"}, settings(), seed=0)
    plot(table, tmp_path / "histogram.png")
    assert (tmp_path / "histogram.png").stat().st_size
