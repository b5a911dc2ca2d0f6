"""The sample and label tables: what `validate` writes, the other steps read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.digests import medium_sha256
from nvila.components.contracts.errors import DataError
from nvila.components.data.media import MediaError
from nvila.components.data.samples import Turn, read_labels, read_samples, write_labels, write_samples


def row(identity: str, **changes: Any) -> dict[str, Any]:
    source, split, _ = identity.split("/")
    turns = [{"from": "human", "value": "<image>\nWas ist das?"}, {"from": "gpt", "value": "ein Käse ☃"}]
    return {
        "id": identity,
        "source": source,
        "kind": "image",
        "split": split,
        "root": "/data/a",
        "media": ["images/1.png"],
        "media_sha256": ["00"],
        "conversations": json.dumps(turns),
        "question": "Was ist das?",
        "answer": "ein Käse ☃",
        "line": 0,
    } | changes


def test_round_trip_and_filters(tmp_path: Path) -> None:
    """Prevents steps from reading other samples, or another order, than they ask for."""
    table = tmp_path / "samples.parquet"
    names = ["a/sft/2", "a/heldout/1", "b/sft/1", "a/sft/1"]
    write_samples(table, [row(name) for name in names])
    assert [sample.id for sample in read_samples(table)] == names
    assert [sample.id for sample in read_samples(table, split="sft", sources=["a"])] == ["a/sft/2", "a/sft/1"]
    assert [sample.id for sample in read_samples(table, ids=["a/sft/1", "b/sft/1"])] == ["b/sft/1", "a/sft/1"]
    sample = read_samples(table)[0]
    assert sample.conversations == (Turn("human", "<image>\nWas ist das?"), Turn("gpt", "ein Käse ☃"))
    assert sample.paths == [Path("/data/a/images/1.png")]


def test_unknown_ids_are_an_error(tmp_path: Path) -> None:
    """Prevents a pruned list that does not fit the table from silently training on less."""
    write_samples(tmp_path / "s.parquet", [row("a/sft/1")])
    with pytest.raises(DataError, match=r"1 samples are not in the table.*a/sft/9"):
        read_samples(tmp_path / "s.parquet", ids=["a/sft/1", "a/sft/9"])


def test_an_unreadable_table_names_its_path(tmp_path: Path) -> None:
    """Prevents a traceback of the Parquet library as the only message."""
    (tmp_path / "s.parquet").write_text("no table")
    for name in ("s.parquet", "missing.parquet"):
        with pytest.raises(DataError, match=name):
            read_samples(tmp_path / name)


def test_paths_are_checked_again_when_read(tmp_path: Path) -> None:
    """Prevents a table from elsewhere from naming files outside its source."""
    write_samples(tmp_path / "s.parquet", [row("a/sft/1", media=["../../etc/passwd"])])
    with pytest.raises(MediaError):
        _ = read_samples(tmp_path / "s.parquet")[0].paths


def test_labels_round_trip(tmp_path: Path) -> None:
    """Prevents an absent box or frame from becoming a number."""
    table = tmp_path / "labels.parquet"
    rows = [
        {"source": "a", "root": "/d", "media": "1.png", "frame": None, "box": [0.0, 0.0, 0.5, 0.5], "labels": ["x"]},
        {"source": "b", "root": "/d", "media": "1.mp4", "frame": 3, "box": None, "labels": ["y", "z"]},
    ]
    write_labels(table, rows)
    first, second = read_labels(table)
    assert (first.frame, first.box, first.labels) == (None, (0.0, 0.0, 0.5, 0.5), ("x",))
    assert (second.frame, second.box, second.labels) == (3, None, ("y", "z"))
    assert read_labels(table, sources=["b"]) == [second]


@pytest.mark.parametrize("kind", ["file", "folder of frames"])
def test_a_medium_changed_after_validation_is_not_opened(tmp_path: Path, kind: str) -> None:
    """A picture swapped between validation and training was trained on, under the name of the old one."""
    path = tmp_path / "m"
    if kind == "file":
        path.write_text("picture")
    else:
        path.mkdir()
        (path / "0.png").write_text("frame")
    digest = medium_sha256(path)
    known = [digest], ["x"], []
    write_samples(
        tmp_path / "s.parquet",
        [row(f"a/sft/{n}", root=str(tmp_path), media=["m"], media_sha256=d) for n, d in enumerate(known)],
    )
    label = {"source": "a", "root": str(tmp_path), "media": "m", "frame": None, "box": None, "labels": ["x"]}
    write_labels(tmp_path / "l.parquet", [label | {"media_sha256": digest}, label])
    samples, labels = read_samples(tmp_path / "s.parquet"), read_labels(tmp_path / "l.parquet")
    assert [s.paths for s in samples] == [[path]] * 3 and [each.path for each in labels] == [path] * 2
    (path if kind == "file" else path / "0.png").write_text("another")
    for look in (lambda: samples[0].paths, lambda: labels[0].path):
        with pytest.raises(MediaError, match=f"{path}: the medium was changed") as error:
            look()
        assert error.value.problem == "changed"
    assert samples[1].paths == samples[2].paths == [labels[1].path] == [path]  # nothing is known of them
