"""A record's own fields in the sample table: short ones are kept, odd ones break nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.components.contracts.recipe.data import Source
from nvila.components.data.samples import read_samples, sample_batches, write_samples
from nvila.components.validate.annotations import FIELD_CHARACTERS, FIELDS, read_records

RECORD = {
    "id": "1",
    "image": "1.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "this"}],
}


def rows(folder: Path, *further: dict[str, Any]) -> list[dict[str, Any]]:
    path = folder / "sft.json"
    path.write_text(json.dumps([further_one | RECORD for further_one in further]))
    return read_records(Source(name="s", kind="image", path=str(folder)), "sft", path)


def fields(folder: Path, **further: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(rows(folder, further)[0]["fields"])
    return found


def test_short_fields_are_kept(tmp_path: Path) -> None:
    """A user's own grouping cannot be followed where the table does not hold it."""
    assert fields(tmp_path, topic="signs", level=2, fine=True, share=0.5) == {
        "fine": True, "level": 2, "share": 0.5, "topic": "signs",
    }  # fmt: skip
    assert fields(tmp_path) == {}


@pytest.mark.parametrize(
    "value", [None, [], {}, "x" * (FIELD_CHARACTERS + 1), float("nan"), float("inf"), 10**400, {"a": {"b": 1}}]
)
def test_other_values_are_left_out(tmp_path: Path, value: Any) -> None:
    """What is no short value must neither fill the table nor spoil its JSON."""
    assert fields(tmp_path, odd=value, topic="signs") == {"topic": "signs"}


def test_of_many_fields_the_first_by_name_are_kept(tmp_path: Path) -> None:
    """A record of a thousand fields must not fill the table, nor lose the few that are meant."""
    many = fields(tmp_path, **{f"f{n:03}": n for n in range(100)}, a=[1], **{"x" * 300: 1})
    assert many == {f"f{n:03}": n for n in range(FIELDS)}


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=5,
)))  # fmt: skip
def test_no_field_breaks_validation(tmp_path_factory: pytest.TempPathFactory, further: dict[str, Any]) -> None:
    """Names and values come from anywhere; keys that the format knows stay what they are."""
    further = {key: value for key, value in further.items() if key != "video"}
    text = rows(tmp_path_factory.mktemp("odd"), further)[0]["fields"]
    found = json.loads(text)
    assert set(found) <= set(further) - set(RECORD) and len(found) <= FIELDS
    assert list(found) == sorted(found)


def test_a_table_of_an_older_run_reads(tmp_path: Path) -> None:
    """A run from before the column cannot be resumed where its table is not read any more."""
    table = tmp_path / "samples.parquet"
    write_samples(table, [{**rows(tmp_path, {"topic": "signs"})[0], "conversations": "[]"}])
    assert [batch.column("fields").to_pylist() for batch in sample_batches(table, 9, split="sft", sources=["s"])] == [
        ['{"topic": "signs"}']
    ]
    pq.write_table(pq.read_table(table).drop(["fields"]), table)
    assert read_samples(table)[0].id == "s/sft/1"
    asked = sample_batches(table, 9, split="sft", sources=["s"], columns=["id", "fields"])
    assert ["fields" in batch.column_names for batch in asked] == [False]
