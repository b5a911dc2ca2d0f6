"""The step `validate`: finds exactly what is spoilt, stops where the data as a whole cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nvila.components.contracts import jsonlines
from nvila.components.contracts.errors import DataError
from nvila.components.contracts.manifest import sha256_file
from nvila.components.contracts.recipe.data import Source
from nvila.components.contracts.results.model import Validation
from nvila.components.contracts.step import Outcome
from nvila.components.data.demo import ensure
from nvila.components.data.samples import read_labels, read_samples
from nvila.components.validate import step

NAMES = ("shapes", "digits", "clips")
Record = dict[str, Any]


def settings(*sources: Record, **limits: Any) -> Record:
    return {"data": {"sources": list(sources), "validation": limits}}


def run(given: Record, out: Path) -> Outcome:
    out.mkdir(exist_ok=True)
    return step.run(step.Settings.model_validate(given), {}, out)


def quarantine(out: Path) -> dict[str, Record]:
    return {record["id"]: record for record in jsonlines.whole(out / "quarantine.jsonl")}


def asked(identity: str, media: str | list[str], question: str = "What?", answer: str = "this") -> Record:
    markers = "<image>\n" * (1 if isinstance(media, str) else len(media))
    turns = [{"from": "human", "value": markers + question}, {"from": "gpt", "value": answer}]
    return {"id": identity, "image": media, "conversations": turns}


def picture(path: Path, level: int, size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 0, 0)).save(path)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A small source as a user would bring it: 8 training pictures and 2 held-out ones."""
    root = tmp_path / "own"
    for index in range(10):
        picture(root / f"{index}.png", index * 10)
    records = [asked(f"q{index}", f"{index}.png") for index in range(10)]
    write(root, "sft", records[:8])
    write(root, "heldout", records[8:])
    return root


def write(root: Path, name: str, content: Any) -> None:
    (root / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def read(root: Path, name: str) -> list[Record]:
    return json.loads((root / f"{name}.json").read_text(encoding="utf-8"))


def of(root: Path, **limits: Any) -> Record:
    return settings({"name": "own", "kind": "image", "path": str(root)}, **{"max_quarantined_share": 1.0} | limits)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    """The demonstration sources, validated without a network."""
    root = tmp_path_factory.mktemp("demo")
    sources = [
        {
            "name": name,
            "kind": "video" if name == "clips" else "image",
            "path": str(root / name),
            "demo": name,
            "demo_scale": 0.02,
        }
        for name in NAMES
    ]
    for source in sources:
        ensure(Source.model_validate(source))
    given, out = settings(*sources), root / "out"
    outcome, real = None, socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            raise AssertionError(f"validation called {address}")
        real(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        outcome = run(given, out)
    assert outcome.result
    (out / "told.json").write_text(outcome.result.model_dump_json())
    return given, out


def test_quarantine_is_exactly_what_was_spoilt(demo: tuple[Record, Path]) -> None:
    """Prevents a spoilt record from being trained on, and a good one from being lost."""
    given, out = demo
    expected = {}
    for source in given["data"]["sources"]:
        for item in json.loads(Path(source["path"], "SOURCE.json").read_text())["spoilt"]:
            expected[f"{source['name']}/{item['split']}/{item['id']}"] = item["reason"]
    found = quarantine(out)
    assert {identity: record["reason"] for identity, record in found.items()} == expected
    assert all(record["detail"] for record in found.values())
    for identity, record in found.items():
        line = read(Path(given["data"]["sources"][NAMES.index(record["source"])]["path"]), "sft")[record["line"]]
        assert identity == f"{record['source']}/sft/{line['id']}"


def test_everything_else_is_in_the_table(demo: tuple[Record, Path]) -> None:
    """Prevents records from vanishing without a line in the quarantine, and values that do not fit the table."""
    given, out = demo
    samples = read_samples(out / "samples.parquet")
    ids = {sample.id for sample in samples}
    for source in given["data"]["sources"]:
        for split in ("sft", "captions", "heldout"):
            there = {f"{source['name']}/{split}/{record['id']}" for record in read(Path(source["path"]), split)}
            of_split = {i for i in ids if i.startswith(f"{source['name']}/{split}/")}
            assert of_split == there - set(quarantine(out))
            counts = json.loads((out / "told.json").read_text())["records"]
            assert counts[source["name"]][split] == len(of_split)
    assert all(path.is_file() for sample in samples for path in sample.paths)
    assert len({(label.source, label.media) for label in read_labels(out / "labels.parquet")}) == 80 + 120 + 50
    clip = next(sample for sample in samples if sample.source == "clips")
    assert clip.conversations[0].text.startswith("<vila/video>\n") and "<" not in clip.question


def test_data_docs_read_offline(demo: tuple[Record, Path]) -> None:
    """Prevents data docs that are unstyled, or that call home, where there is no network."""
    import re

    text = (demo[1] / "data_docs.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|<iframe|@import|url\(", text)
    assert "Content-Security-Policy" in text and text.count("<style>") == 1
    for expected in ("media_status", "undecodable", "shortest_answer_chars", "clips", "values must be unique"):
        assert expected in text
    results = json.loads((demo[1] / "validation.json").read_text())
    assert list(results) == ["records", "labels", "pictures", "sources"]
    assert not results["records"]["success"] and results["pictures"]["success"] and results["sources"]["success"]


def test_twice_the_same(demo: tuple[Record, Path], tmp_path: Path) -> None:
    """Prevents times or random names in outputs, which would give the same data another identity."""
    given, out = demo
    outcome = run(given, tmp_path / "again")
    for name in outcome.files:
        assert sha256_file(out / name) == sha256_file(tmp_path / "again" / name), name
    assert outcome.result == Validation.model_validate_json((out / "told.json").read_text())
    assert {Path(file.uri).name for file in outcome.sources} == {f"{n}.json" for n in (*step.SPLITS, "labels")}


def test_external_changes_with_the_data(own: Path) -> None:
    """Prevents a changed picture or answer from being skipped as work that was done already."""
    first = step.external(of(own))
    assert step.external(of(own)) == first
    picture(own / "3.png", 200, (17, 17))
    second = step.external(of(own))
    assert second["own"]["media"] != first["own"]["media"] and second["own"]["files"] == first["own"]["files"]
    write(own, "sft", read(own, "sft")[:7])
    assert step.external(of(own))["own"]["files"]["sft"] != first["own"]["files"]["sft"]


def test_each_breach_has_its_reason(own: Path, tmp_path: Path) -> None:
    """Prevents a rule from being written down and not applied."""
    picture(own / "tiny.png", 1, (4, 40))
    picture(own / "large.png", 2, (80, 80))
    (own / "link.png").symlink_to(tmp_path / "elsewhere.png")
    picture(tmp_path / "elsewhere.png", 3)
    spoilt = {
        "tiny": asked("tiny", "tiny.png"),
        "large": asked("large", "large.png"),
        "up": asked("up", "../elsewhere.png"),
        "link": asked("link", "link.png"),
        "long": asked("long", "1.png", "w" * 300),
        "few": asked("few", ["1.png", "2.png"]) | {"image": "1.png"},
        "none": asked("none", []) | {"image": None, "conversations": asked("", "1.png")["conversations"]},
        "told": asked("told", "1.png", "and?", "an <image>"),
        "film": asked("film", "1.png", "a <video>?"),
        "void": asked("void", "1.png", "empty?", "\n"),
        "part": asked("part", ["2.png", "lost.png"]),
    }
    write(own, "sft", [*read(own, "sft"), *spoilt.values(), asked("q1", "2.png", "again?")])
    run(of(own, max_pixels=5000, max_text_chars=200), tmp_path / "out")
    found = {identity.split("/")[2]: record["reason"] for identity, record in quarantine(tmp_path / "out").items()}
    assert found == {
        "tiny": "too_small",
        "large": "too_large",
        "up": "outside_source",
        "link": "outside_source",
        "long": "text_too_long",
        "few": "marker_mismatch",
        "none": "marker_mismatch",
        "told": "marker_mismatch",
        "film": "marker_mismatch",
        "void": "empty_answer",
        "part": "missing_file",
        "q1": "duplicate_id",
    }
    kept = {sample.id for sample in read_samples(tmp_path / "out" / "samples.parquet", split="sft")}
    assert kept == {f"own/sft/q{index}" for index in range(8)}


def test_several_pictures_in_one_record(own: Path, tmp_path: Path) -> None:
    """Prevents records with more than one picture from losing some, or their order."""
    write(own, "sft", [*read(own, "sft"), asked("two", ["5.png", "2.png"], "Which is redder?")])
    run(of(own), tmp_path / "out")
    (sample,) = read_samples(tmp_path / "out" / "samples.parquet", ids=["own/sft/two"])
    assert sample.media == ("5.png", "2.png") and sample.question == "Which is redder?"


def test_a_leak_stops_the_run(own: Path, tmp_path: Path) -> None:
    """Prevents a held-out picture from being trained on under another name, or from having a label."""
    shutil.copy(own / "2.png", own / "copy.png")
    write(own, "heldout", [*read(own, "heldout"), asked("leak", "copy.png", "Something else?")])
    with pytest.raises(DataError, match=r"1 held-out pictures are training pictures.*") as caught:
        run(of(own), tmp_path / "out")
    assert "own/sft.json[2]" in str(caught.value) and "own/heldout.json[2]" in str(caught.value)
    write(own, "heldout", [asked("q9", "9.png")])
    write(own, "labels", [{"image": "9.png", "box": None, "labels": ["dark"]}])
    with pytest.raises(DataError, match="held-out pictures are training pictures"):
        run(of(own), tmp_path / "out2")


def test_too_much_spoilt_stops_the_run(own: Path, tmp_path: Path) -> None:
    """Prevents training on what is left when a whole folder of media is missing."""
    for index in range(4):
        (own / f"{index}.png").unlink()
    with pytest.raises(DataError, match=r"source 'own' .*: 4 of 10 records are spoilt, more than 30%") as caught:
        run(of(own, max_quarantined_share=0.3), tmp_path / "out")
    assert len(quarantine(tmp_path / "out")) == 4, "the quarantine must be there to be read"
    assert caught.value.details == {
        "quarantine": str(tmp_path / "out" / "quarantine.jsonl"),
        "sources": {"own": {"records": 10, "quarantined": 4, "reasons": {"missing_file": 4}}},
    }
    run(of(own, max_quarantined_share=0.31), tmp_path / "out")  # rounded up, as of a few records one may be odd


def test_all_that_stands_against_the_data_is_said_at_once(own: Path, tmp_path: Path) -> None:
    """Five runs were needed to learn of five kinds of trouble, and the first message spoke of another one."""
    other = tmp_path / "other"
    shutil.copytree(own, other)
    for index in range(3):
        picture(other / f"{index}.png", 200 + index)
    spoilt = [asked(f"s{i}", f"https://example.org/{i}.png") for i in range(5)]
    spoilt += [asked(f"t{i}", f"/data/{i}.png") for i in range(4)]
    spoilt += [asked(f"u{i}", f"../{i}.png") for i in range(3)]
    spoilt += [{"id": f"v{i}", "images": ["1.png"], "conversations": []} for i in range(2)] + [["x"]]
    write(own, "sft", [*read(own, "sft"), *spoilt])
    write(other, "sft", [asked(f"o{i}", f"{i}.png", f"What is {i}?") for i in range(8)])
    write(other, "heldout", [asked("leak", "7.png", "Something else?"), asked("o9", "9.png", "Held out?")])
    (other / "4.png").unlink()
    (other / "5.png").unlink()
    sources = [{"name": name, "kind": "image", "path": str(tmp_path / name)} for name in ("own", "other")]
    with pytest.raises(DataError) as caught:
        run(settings(*sources), tmp_path / "out")
    said = str(caught.value)
    for words in (
        "'own'",
        "15 of 25 records are spoilt, more than 5%: 12 outside_source (https://example.org/0.png: an address",
        "2 bad_media (the key `images` is not read: `image` names a path, or a list of paths), 1 not_a_record",
        "'other'",
        "2 of 10 records are spoilt, more than 5%: 2 missing_file (4.png: no such",
        "held-out pictures are training pictures as well",
        str(tmp_path / "out" / "quarantine.jsonl"),
    ):
        assert words in said, said
    reasons = {one["detail"] for one in quarantine(tmp_path / "out").values() if one["reason"] == "outside_source"}
    assert any("an absolute path" in each for each in reasons) and any("must stay inside" in each for each in reasons)


def test_a_source_that_is_too_small_stops_the_run(own: Path, tmp_path: Path) -> None:
    """Prevents a mixture in which one source does not count."""
    other = tmp_path / "other"
    shutil.copytree(own, other)
    write(other, "sft", [asked("new", "7.png", "New?")])
    write(other, "heldout", [asked("newer", "9.png", "Newer?")])
    sources = [{"name": name, "kind": "image", "path": str(tmp_path / name)} for name in ("own", "other")]
    with pytest.raises(DataError, match=r"'other' .* has 1 of 9 good SFT records; at least 20% are.*min_source_share"):
        run(settings(*sources, min_source_share=0.2), tmp_path / "out")
    run(settings(*sources, min_source_share=0.1), tmp_path / "out")


def test_bad_labels_are_quarantined(own: Path, tmp_path: Path) -> None:
    """Prevents the base model from learning from boxes outside pictures and from lost files."""
    rows = [
        {"image": "1.png", "box": [0, 0, 0.5, 1], "labels": ["fine"]},
        {"image": "1.png", "box": [0.5, 0, 0.2, 1], "labels": ["inside out"]},
        {"image": "1.png", "box": [0, 0, 1.5, 1], "labels": ["outside"]},
        {"image": "lost.png", "box": None, "labels": ["lost"]},
        {"image": "1.png", "box": None, "labels": []},
    ]
    write(own, "labels", rows)
    run(of(own), tmp_path / "out")
    found = {record["line"]: record["reason"] for record in quarantine(tmp_path / "out").values()}
    assert found == {1: "bad_box", 2: "bad_box", 3: "missing_file", 4: "empty_labels"}
    assert [label.labels for label in read_labels(tmp_path / "out" / "labels.parquet")] == [("fine",)]


def test_text_of_the_data_is_no_markup(own: Path, tmp_path: Path) -> None:
    """Prevents a record's id or path from running as code in the data docs."""
    bad = "<img src=x onerror=alert(1)>"
    write(own, "sft", [*read(own, "sft"), asked(bad, "1.png", "a"), asked(bad, "1.png", "b"), asked("z", f"{bad}.png")])
    run(of(own), tmp_path / "out")
    assert "<img" not in (tmp_path / "out" / "data_docs.html").read_text()
    assert {record["reason"] for record in quarantine(tmp_path / "out").values()} == {"duplicate_id", "missing_file"}


def test_broken_annotation_files(own: Path, tmp_path: Path) -> None:
    """Prevents a message without file and line for a file that is cut off, not text, or not there."""
    text = json.dumps(read(own, "sft"), indent=1)
    (own / "sft.json").write_text(text[:-100])
    last = text[:-100].count("\n") + 1
    with pytest.raises(DataError, match=rf"sft.json:{last}:\d+: broken JSON"):
        run(of(own), tmp_path / "out")
    (own / "sft.json").write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match="not UTF-8"):
        run(of(own), tmp_path / "out")
    (own / "sft.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="nested too deeply"):
        run(of(own), tmp_path / "out")
    write(own, "sft", {"records": []})
    with pytest.raises(DataError, match="must hold a JSON list"):
        run(of(own), tmp_path / "out")
    with pytest.raises(DataError, match=r"own: data source 'own' has no folder"):
        step.external(of(own / "own"))


def test_external_is_of_the_bytes_and_not_of_their_times(own: Path, tmp_path: Path) -> None:
    """`cp -r` to another volume gave every file a new time, and hours of training were done again for it."""
    first = step.external(of(own))
    kept = own.rename(tmp_path / "kept")
    shutil.copytree(kept, own, copy_function=shutil.copyfile)
    for path in own.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    assert step.external(of(own)) == first


def test_data_replaced_while_they_are_validated(own: Path, tmp_path: Path) -> None:
    """A table of the new picture under the key of the old one refuses the old one for ever."""
    first = step.external(of(own))
    assert run(of(own), tmp_path).read == first
    picture(next(own.glob("*.png")), 99)
    assert run(of(own), tmp_path).read != first


def test_external_sees_other_bytes_behind_the_same_facts(own: Path) -> None:
    """A picture replaced by one of equal size with its time set back would keep the key of the old one."""
    first = step.external(of(own))
    picture = next(path for path in sorted(own.rglob("*.png")))
    facts = picture.stat()
    picture.write_bytes(bytes(reversed(picture.read_bytes())))
    os.utime(picture, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert step.external(of(own)) != first
