"""What a source is made of, before and after, and what counts as moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from nvila.components.data.media import Limits
from nvila.components.prune.composition import RESPECTS, makeup, moved


@pytest.fixture
def rows(tmp_path: Path) -> pyarrow.Table:
    """100 questions, 60 yes and 40 no, about two small pictures, one large one and one that is gone."""
    from PIL import Image

    for name, side in (("0.png", 8), ("1.png", 8), ("2.png", 16)):
        Image.new("RGB", (side, side)).save(tmp_path / name)
    n = 100
    return pyarrow.table(
        {
            "source": ["s"] * n,
            "kind": ["image"] * n,
            "root": [str(tmp_path)] * n,
            "media": [[f"{i % 4}.png"] for i in range(n)],
            "answer": ["Yes" if i < 60 else "no." for i in range(n)],
        }
    )


def made(rows: Any, kept: Any) -> Any:
    return makeup([rows.slice(0, 33), rows.slice(33)], kept, Limits())


def test_the_composition_is_that_of_the_samples(rows: pyarrow.Table) -> None:
    """A report that counts pictures for questions, or what stays for all, hides what pruning did."""
    kept = np.arange(100) < 50
    found = made(rows, kept)["s"]
    assert list(found) == list(RESPECTS)
    assert found["answers"].before == {"yes": 0.6, "no": 0.4} and found["answers"].after == {"yes": 1.0}
    assert found["answers"].shift == 0.4
    assert found["answer kinds"].shift == 0 and found["answer kinds"].before == {"yes/no": 1.0}
    assert found["resolutions"].before == {"8x8": 0.5, "16x16": 0.25, "unknown": 0.25}
    told = moved({"s": found}, {"s": 50}, 0.1)
    assert [line.split(" moved")[0] for line in told] == ["s: answers"]
    assert "yes 0.60 -> 1.00" in told[0]
    assert moved({"s": found}, {"s": 50}, 0.5) == []


def test_chance_alone_is_no_shift() -> None:
    """With few samples a random half moves too: a warning at every run is read by nobody."""
    choice = np.random.default_rng(0)
    answers = [f"a{i % 15}" for i in range(300)]
    table = pyarrow.table(
        {
            "source": ["s"] * 300,
            "kind": ["image"] * 300,
            "root": ["/"] * 300,
            "media": pyarrow.array([[]] * 300, type=pyarrow.list_(pyarrow.string())),
            "answer": answers,
        }
    )
    warned = 0
    for _ in range(50):
        kept = np.zeros(300, dtype=bool)
        kept[choice.permutation(300)[:30]] = True
        warned += bool(moved(made(table, kept), {"s": 30}, 0.1))
    assert warned <= 2


def test_many_answers_are_told_as_others() -> None:
    """A source of free answers would fill the report, and memory, with them."""
    n = 1000
    table = pyarrow.table(
        {
            "source": ["s"] * n,
            "kind": ["image"] * n,
            "root": ["/"] * n,
            "media": pyarrow.array([[]] * n, type=pyarrow.list_(pyarrow.string())),
            "answer": [f"answer number {i}" for i in range(n)],
        }
    )
    found = made(table, np.ones(n, dtype=bool))["s"]["answers"]
    assert len(found.before) == 21 and found.before["others"] == pytest.approx(0.98) and found.shift == 0
