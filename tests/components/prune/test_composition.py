"""What a source is made of, before and after, and what counts as moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from nvila.components.contracts.digests import file_sha256
from nvila.components.data.media import Limits
from nvila.components.prune import composition
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
    told = moved({"s": found}, 0.1)
    assert [line.split(" moved")[0] for line in told] == ["s: answers"]
    assert "yes 0.60 -> 1.00" in told[0]
    assert moved({"s": found}, 0.5) == []


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
        warned += bool(moved(made(table, kept), 0.1))
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


def test_chance_is_what_a_random_choice_moves() -> None:
    """Too little of it warns at every run; too much hides what pruning did. All that stays cannot move."""
    choice = np.random.default_rng(1)
    answers = ["a"] * 500 + ["b"] * 300 + [f"c{i % 10}" for i in range(200)]
    table = pyarrow.table(
        {
            "source": ["s"] * 1000,
            "kind": ["image"] * 1000,
            "root": ["/"] * 1000,
            "media": pyarrow.array([[]] * 1000, type=pyarrow.list_(pyarrow.string())),
            "answer": answers,
        }
    )
    for m in (100, 700):
        shifts = []
        for _ in range(40):
            kept = np.zeros(1000, dtype=bool)
            kept[choice.permutation(1000)[:m]] = True
            found = made(table, kept)["s"]["answers"]
            shifts.append(found.shift)
        assert found.chance == pytest.approx(np.mean(shifts), rel=0.15)
    assert made(table, np.ones(1000, dtype=bool))["s"]["answers"].chance == 0


def test_resolutions_are_as_sure_as_the_media_looked_at(rows: pyarrow.Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift among a few media would count as if all the samples had been looked at."""
    # Each picture has a size of its own: which two are looked at depends on where they lie.
    monkeypatch.setattr(composition, "_size", lambda path, *_: (8 + int(Path(path[1]).stem), 8))
    monkeypatch.setattr(composition, "MEASURED_MEDIA", 2)
    few = made(rows, np.arange(100) < 50)["s"]["resolutions"]
    assert len(few.before) == 2 and sum(few.before.values()) == pytest.approx(1)
    assert few.chance == pytest.approx(0.057, abs=0.005)  # of 25 of 50; of 50 of 100 it would be 0.040


def test_a_medium_that_was_changed_is_not_opened(rows: pyarrow.Table, tmp_path: Path) -> None:
    """Other bytes than those that were validated may be anything; names may be, too."""
    digest = file_sha256(tmp_path / "0.png")
    known = rows.append_column("media_sha256", pyarrow.array([[digest]] * 100))
    found = made(known, np.ones(100, dtype=bool))["s"]["resolutions"].before
    assert found == {"8x8": 0.5, "unknown": 0.5}  # 1.png has the bytes of 0.png
    odd = rows.set_column(3, "media", pyarrow.array([["../0.png"], ["a\0b"], ["/0.png"], ["../../0.png"]] * 25))
    assert made(odd, np.ones(100, dtype=bool))["s"]["resolutions"].before == {"unknown": 1.0}


def test_a_long_answer_is_told_by_its_beginning(rows: pyarrow.Table) -> None:
    """Twenty pages of text would stand in the manifest, and millions in memory."""
    long = rows.set_column(4, "answer", pyarrow.array([f"{'word ' * 200}{i % 2}" for i in range(100)]))
    found = made(long, np.ones(100, dtype=bool))["s"]["answers"].before
    assert list(found.values()) == [0.5, 0.5] and all(len(answer) < 80 for answer in found)
