"""Answers that are spoilt on purpose."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.data.samples import read_samples, write_samples
from nvila.pipelines.ablate.spoil import SPOILT_FILE, Settings, deranged, run


def _row(number: int, split: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
    return {
        "id": f"things/{split}/{number:03}",
        "source": "things",
        "kind": "image",
        "split": split,
        "root": "/data",
        "media": [f"{number}.png"],
        "media_sha256": [None],
        "conversations": json.dumps(turns),
        "question": "What is it?",
        "answer": answer,
        "line": number,
    }


@pytest.fixture
def samples(tmp_path: Path) -> Manifest:
    """100 SFT samples with four answers, 20 held-out ones."""
    folder = tmp_path / "validate"
    folder.mkdir()
    rows = [_row(n, "sft", "abcd"[n % 4]) for n in range(100)] + [_row(n, "heldout", "a") for n in range(20)]
    write_samples(folder / "samples.parquet", rows)
    return Manifest(step="validate", key="k", kind="dataset", files=describe_files(folder), folder=str(folder))


def test_a_share_of_the_answers_is_another_samples(samples: Manifest, tmp_path: Path) -> None:
    """Fewer spoilt than told, or an answer that stayed right, would make every share that a method drops wrong."""
    run(Settings(share=0.3, seed=1), {"samples": samples}, tmp_path)
    before = {s.id: s for s in read_samples(samples.path("samples.parquet"))}
    after = {s.id: s for s in read_samples(tmp_path / "samples.parquet")}
    changed = {one for one in before if before[one].answer != after[one].answer}
    assert changed == set(json.loads((tmp_path / SPOILT_FILE).read_text())) and len(changed) == 30
    assert {before[one].split for one in changed} == {"sft"}
    assert all(after[one].conversations[1].text == after[one].answer for one in after)
    assert Counter(s.answer for s in before.values()) == Counter(s.answer for s in after.values())
    assert parquet.read_schema(tmp_path / "samples.parquet") == parquet.read_schema(samples.path("samples.parquet"))


def test_the_same_seed_spoils_the_same(samples: Manifest, tmp_path: Path) -> None:
    """Cases of one experiment, and those after a resume, must be about the same data."""
    told = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        run(Settings(seed=seed), {"samples": samples}, tmp_path / name)
        told.append((tmp_path / name / "samples.parquet").read_bytes())
    assert told[0] == told[1] != told[2]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=3).filter(lambda t: 3 * max(Counter(t).values()) <= len(t)))
def test_no_answer_stays_where_it_was(texts: list[str]) -> None:
    """A sample that got its own text back counts as spoilt and is not."""
    moved = deranged(texts, random.Random(0))
    assert sorted(moved) == sorted(texts) and all(a != b for a, b in zip(moved, texts, strict=True))


def test_a_source_with_one_answer_is_refused() -> None:
    """It would otherwise be searched for ever, or be told as spoilt though every answer is right."""
    with pytest.raises(DataError, match=r"same answer.*--no-spoilt"):
        deranged(["Yes", "yes.", "yes", "no"], random.Random(0))
