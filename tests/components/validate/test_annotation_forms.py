"""Annotation files as people and their tools write them: read where the meaning is clear, else set aside in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nvila.components.contracts import jsonlines
from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.data import DataSettings
from nvila.components.data.samples import Sample, read_samples
from nvila.components.preflight.checks import data_problems
from nvila.components.validate.step import Settings, run

Record = dict[str, Any]
COUNT = 20


def talk(*turns: tuple[str, Any]) -> list[Record]:
    return [{"from": who, "value": text} for who, text in turns]


QUESTION = ("human", "<image>\nWhat?")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Pictures only."""
    for index in range(COUNT):
        Image.new("RGB", (16, 16), (index * 12, 5, 9)).save(tmp_path / f"{index}.png")
    return tmp_path


def records() -> list[Any]:
    return [{"id": str(i), "image": f"{i}.png", "conversations": talk(QUESTION, ("gpt", "this"))} for i in range(COUNT)]


def validated(root: Path, kind: str = "image") -> tuple[list[Sample], list[Record]]:
    """Good samples, and the quarantine's lines."""
    data = DataSettings.model_validate({"sources": [{"name": "own", "kind": kind, "path": str(root)}]})
    assert data_problems(data.sources) == []
    out = root / "out"
    out.mkdir()
    run(Settings(data=data), {}, out)
    return read_samples(out / "samples.parquet"), list(jsonlines.whole(out / "quarantine.jsonl"))


ODD: list[tuple[Any, str, str]] = [
    ("hello", "not_a_record", "not a text"),
    (17, "not_a_record", "not a number"),
    (None, "not_a_record", "not null"),
    ({"conversations": "hi"}, "bad_conversation", "must be a list of turns, not a text"),
    ({"conversations": []}, "bad_conversation", "not an empty list"),
    ({"conversations": None}, "bad_conversation", "either `conversations` or `messages`"),
    ({"conversations": ["hi"]}, "bad_conversation", "`conversations[0]` must be {from, value}"),
    ({"conversations": talk(("system", "Be brief."), QUESTION, ("gpt", "a"))}, "bad_conversation", "a system turn"),
    ({"conversations": talk(("human", "<image>"))}, "bad_conversation", "the last question has no answer"),
    ({"conversations": talk(("gpt", "hello"))}, "bad_conversation", "there is no question"),
    ({"conversations": talk(QUESTION, ("human", "well?"))}, "bad_conversation", "two questions follow each other"),
    ({"conversations": talk(QUESTION, ("gpt", "a"), ("gpt", "b"))}, "bad_conversation", "two answers"),
    ({"conversations": talk(QUESTION, ("gpt", None))}, "bad_conversation", "must be a text, not null"),
    ({"conversations": talk(QUESTION, ("gpt", 3))}, "bad_conversation", "must be a text, not a number"),
    ({"conversations": talk(QUESTION, ("gpt", "half \ud83d"))}, "bad_text", "half of a surrogate pair"),
    ({"image": 7}, "bad_media", "must be a path or a list of paths, not a number"),
    ({"images": ["3.png"]}, "bad_media", "the key `images` is not read"),
    ({"video": "a.mp4"}, "wrong_kind", "kind image has the key `video`"),
    ({"image": "data:image/png;base64,AAAA"}, "outside_source", "an address"),
    ({"image": None}, "marker_mismatch", "markers: 1, media_count: 0"),
    ({"image": ["3.png", "4.png"]}, "marker_mismatch", "markers: 1, media_count: 2"),
]


@pytest.mark.parametrize(("odd", "reason", "words"), ODD, ids=[str(row[2])[:40] for row in ODD])
def test_one_odd_record_is_set_aside(root: Path, odd: Any, reason: str, words: str) -> None:
    """One record of another form ended the whole run, and named no way to go on."""
    content = records()
    content[3] = content[3] | odd if isinstance(odd, dict) else odd
    (root / "sft.json").write_text(json.dumps(content))
    good, (line,) = validated(root)
    assert len(good) == COUNT - 1
    assert line["reason"] == reason and words in line["detail"] and line["line"] == 3


READ: list[tuple[str, Callable[[Record], Any]]] = [
    ("no id", lambda record: record.pop("id")),
    ("a null id", lambda record: record.update(id=None)),
    ("a number as id", lambda record: record.update(id=10**30)),
    ("gpt first", lambda record: record.update(conversations=talk(("gpt", "Hello."), QUESTION, ("gpt", "this")))),
    ("user, assistant", lambda record: record.update(conversations=talk(("user", QUESTION[1]), ("assistant", "this")))),
    (
        "messages",
        lambda record: record.update(
            conversations=None,
            messages=[{"role": "user", "content": QUESTION[1]}, {"role": "assistant", "content": "this"}],
        ),
    ),
    ("a marker behind the text", lambda record: record["conversations"][0].update(value="What?<image>")),
    ("a number without end", lambda record: record.update(score=10**400)),
    ("keys of its own", lambda record: record.update(nested={"a": [1, None]}, nothing=None)),
]


@pytest.mark.parametrize("change", [row[1] for row in READ], ids=[row[0] for row in READ])
def test_what_is_clear_is_read(root: Path, change: Callable[[Record], Any]) -> None:
    """A record in the words of another tool ended the run."""
    content = records()
    change(content[3])
    (root / "sft.json").write_text(json.dumps(content))
    good, spoilt = validated(root)
    assert len(good) == COUNT and spoilt == []
    assert [turn.role for turn in good[3].conversations] == ["human", "gpt"]
    assert (good[3].question, good[3].answer) == ("What?", "this")


def test_records_of_texts_are_read(root: Path) -> None:
    """LLaVA's mixtures carry some per cent of them; they were set aside, and that many ended the run."""
    content = records()
    for index in (2, 5, 9):
        content[index] = {"id": f"t{index}", "conversations": talk(("human", f"What is {index}+2?"), ("gpt", "4"))}
    (root / "sft.json").write_text(json.dumps(content))
    good, spoilt = validated(root)
    assert len(good) == COUNT and spoilt == [] and good[2].media == ()


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le with its mark", "utf-16-be with its mark"]
)
@pytest.mark.parametrize(("name", "lines"), [("sft.json", False), ("sft.json", True), ("sft.jsonl", True)])
def test_files_as_tools_write_them(root: Path, encoding: str, name: str, lines: bool) -> None:
    """Preflight let pass what validate could not read; JSON lines were refused under either name."""
    text = "\r\n".join(json.dumps(record) for record in records()) if lines else json.dumps(records(), indent=1)
    mark = "\ufeff" if "mark" in encoding else ""
    (root / name).write_bytes((mark + text).encode(encoding.split(" ")[0]))
    good, spoilt = validated(root)
    assert len(good) == COUNT and spoilt == []


def test_a_line_that_is_cut_is_set_aside(root: Path) -> None:
    """A download that broke off in its last line cost all the others."""
    text = "\n".join(json.dumps(record) for record in records())
    (root / "sft.jsonl").write_text(text[:-20])
    good, (line,) = validated(root)
    assert len(good) == COUNT - 1 and line["reason"] == "broken_json" and line["line"] == COUNT - 1


@pytest.mark.parametrize("split", ["captions", "labels", "heldout"])
def test_a_source_may_have_one_kind_of_file(root: Path, split: str) -> None:
    """Sources of captions or labels alone had to bring empty files, which were refused."""
    label = [{"image": f"{i}.png", "box": None, "labels": ["x"]} for i in range(COUNT)]
    (root / f"{split}.json").write_text(json.dumps(label if split == "labels" else records()))
    good, spoilt = validated(root)
    assert spoilt == [] and len(good) == (0 if split == "labels" else COUNT)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"id": "1"', "broken JSON"),
        (b'{"records": []}', "must hold a JSON list of records, or one JSON record a line"),
        (b"null", "must hold a JSON list of records, or one JSON record a line"),
        ('["\u00fc"]'.encode("latin-1"), "not UTF-8 (got 'byte 2'). Save it as UTF-8"),
        (b"\xff\xfe[\x00\x00", "not UTF-16-LE"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_preflight_and_validate_say_the_same(root: Path, content: bytes, words: str) -> None:
    """What passes preflight and ends validate costs the time between them."""
    (root / "sft.json").write_bytes(content)
    data = DataSettings.model_validate({"sources": [{"name": "own", "kind": "image", "path": str(root)}]})
    problems = data_problems(data.sources)
    (root / "out").mkdir()
    assert len(problems) == 1 and words in problems[0]
    with pytest.raises(DataError) as caught:
        run(Settings(data=data), {}, root / "out")
    assert str(caught.value) == problems[0]


def test_odd_labels_are_set_aside(root: Path) -> None:
    """One label of another form ended the run."""
    good = {"image": "1.png", "box": None, "labels": ["x"]}
    boxes: list[Any] = [[0, 0, 10**400, 1], [False, False, True, True], [0, 0, float("nan"), 1], [0, 0, 1], "all"]
    odd = [good | {"box": box} for box in boxes]
    odd += [good | {"labels": "x"}, good | {"image": None}, good | {"frame": 3}, {}, "x"]
    (root / "labels.json").write_text(json.dumps([good] * 300 + odd))
    _, spoilt = validated(root)
    assert [line["line"] for line in spoilt] == list(range(300, 300 + len(odd)))
    assert {line["reason"] for line in spoilt} == {"bad_label", "not_a_record"}


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_a_line_of_json_ends_at_a_line_feed_alone(root: Path, mark: str) -> None:
    """An answer with a separator that JSON need not escape was two broken lines to its reader."""
    content = records()
    content[1]["conversations"][1]["value"] = f"two{mark}lines"
    content[2] |= {"id": f"shop{mark}7", "conversations": talk(QUESTION, ("gpt", ""))}
    (root / "sft.jsonl").write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in content))
    good, (line,) = validated(root)
    assert len(good) == COUNT - 1 and good[1].answer == f"two{mark}lines"
    assert line["id"] == f"own/sft/shop{mark}7" and line["reason"] == "empty_answer"
    assert jsonlines.parse(jsonlines.dump([content])) == [content]


def test_nothing_else_cuts_json_into_lines() -> None:
    """A second way to read JSON lines would be wrong for the separators that the first one minds."""
    top = Path(jsonlines.__file__).parents[2]
    sources = [path for part in ("components", "pipelines", "infra") for path in (top / part).rglob("*.py")]
    assert len(sources) > 300
    found = [
        path.relative_to(top).as_posix()
        for path in sources
        for text in [path.read_text()]
        if "json.loads(line)" in text or "map(json.loads" in text
    ]
    assert found == ["components/contracts/jsonlines.py"]
