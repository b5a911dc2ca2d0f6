"""Demonstration sources: deterministic, disjoint, complete at any scale, and never half-written."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.manifest import sha256_file
from nvila.components.contracts.recipe.data import Source
from nvila.components.data.demo import build as build_module
from nvila.components.data.demo import clips, digits, ensure, handwriting, shapes
from nvila.components.data.media import load_image, load_video_frames
from nvila.components.data.sampling import Sampling

NAMES = ("shapes", "digits", "clips")
SCALE = 0.02


def source(name: str, root: Path, scale: float = SCALE) -> Source:
    kind = "video" if name == "clips" else "image"
    return Source.model_validate(
        {"name": name, "kind": kind, "path": str(root / name), "demo": name, "demo_scale": scale}
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    for name in NAMES:
        ensure(source(name, root))
    return root


def records(root: Path, name: str, file: str) -> list[dict[str, Any]]:
    return json.loads((root / name / f"{file}.json").read_text(encoding="utf-8"))


def good(root: Path, name: str) -> list[dict[str, Any]]:
    """SFT records that are not spoilt on purpose."""
    spoilt = {item["id"] for item in json.loads((root / name / "SOURCE.json").read_text())["spoilt"]}
    return [record for record in records(root, name, "sft") if record["id"] not in spoilt]


def answer(record: dict[str, Any]) -> str:
    return record["conversations"][1]["value"]


def question(record: dict[str, Any]) -> str:
    return record["conversations"][0]["value"].partition("\n")[2]


def medium(record: dict[str, Any]) -> str:
    return record.get("image") or record["video"]


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): sha256_file(path) for path in sorted(root.rglob("*")) if path.is_file()}


def test_two_builds_are_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    """Prevents results from depending on when or where the data were built."""
    for name in NAMES:
        ensure(source(name, tmp_path))
        assert contents(tmp_path / name) == contents(demo / name)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_scale_has_everything(demo: Path, name: str) -> None:
    """Prevents the micro recipe from running on a source without some class, split or kind of spoilt record."""
    trained, held_out = good(demo, name), records(demo, name, "heldout")
    assert len(held_out) >= 40 and len(records(demo, name, "captions")) >= 48
    classes = {str(digit) for digit in range(10)}
    wanted = {*shapes.PALETTE, "yes", "no", "circle", "rectangle", "triangle"} if name == "shapes" else classes
    assert {answer(record) for record in trained} == wanted
    assert {answer(record) for record in held_out} <= wanted
    stamp = json.loads((demo / name / "SOURCE.json").read_text())
    reasons = Counter(item["reason"] for item in stamp["spoilt"])
    assert set(reasons) == {"undecodable", "missing_file", "empty_answer", "duplicate"}
    ids = {record["id"] for record in records(demo, name, "sft")}
    assert {item["id"] for item in stamp["spoilt"]} <= ids


@pytest.mark.parametrize("name", NAMES)
def test_train_and_held_out_share_no_picture(demo: Path, name: str) -> None:
    """Prevents accuracy from being measured on what was trained on."""
    root = demo / name

    def digests(files: tuple[str, ...]) -> set[str]:
        named = {medium(record) for file in files for record in records(demo, name, file)}
        return {sha256_file(root / media) for media in named if (root / media).exists()}

    assert not digests(("sft", "captions", "labels")) & digests(("heldout",))


def test_train_and_held_out_share_no_digit() -> None:
    """Prevents a held-out grid or clip from being made of digits that were trained on, in another arrangement."""
    training, held_out = handwriting.load()
    assert not training.indices & held_out.indices
    assert (len(training.indices), len(held_out.indices)) == (1297, 500)
    seen = {picture.tobytes() for pictures in training.by_class.values() for picture in pictures}
    assert not seen & {picture.tobytes() for pictures in held_out.by_class.values() for picture in pictures}
    assert all(len(held_out.by_class[digit]) >= 30 for digit in range(10))


def test_shapes_labels_agree_with_the_package() -> None:
    """Prevents wrong labels: what the pixels say must be what the package answers, on more than 99.5% of pictures."""
    folder = shapes.package_data() / "train"
    told = defaultdict(set)
    for _, said, picture in json.loads((folder / "questions.json").read_text()):
        if said not in ("yes", "no"):
            told[picture].add(said)
    pictures = sorted(told)[::4]
    right = sum(told[picture] <= set(shapes.look(folder / "images" / f"{picture}.png")) for picture in pictures)
    assert len(pictures) > 900 and right / len(pictures) > 0.995


def test_grids_show_what_is_asked(demo: Path) -> None:
    """Prevents rows and columns, or a box and its label, from being mixed up."""
    labels = defaultdict(dict)
    for record in records(demo, "digits", "labels"):
        if record["box"] is None:
            labels[record["image"]]["whole"] = record["labels"]
        else:
            labels[record["image"]][tuple(record["box"])] = record["labels"][0]
    for record in good(demo, "digits"):
        row, column = (int(word.rstrip(",?")) for word in question(record).split() if word[0].isdigit())
        shown = labels[record["image"]]
        box = ((column - 1) / 2, (row - 1) / 2, column / 2, row / 2)
        assert shown[box] == f"digit {answer(record)}"
        assert f"row {row} column {column}: {answer(record)}" in shown["whole"]
    training, _ = handwriting.load()
    assert load_image(demo / "digits/images/train/0000.png").size == (56, 56)
    assert digits.CELL_PIXELS * 2 == 56 and set(training.by_class) == set(range(10))


def test_a_cell_holds_its_digit(demo: Path) -> None:
    """Prevents labels that do not fit the pixels: each cell is nearest to some training digit of its own label."""
    training, _ = handwriting.load()
    known = {
        picture.resize((28, 28), 2).tobytes(): digit
        for digit, pictures in training.by_class.items()
        for picture in pictures
    }
    cells = [record for record in records(demo, "digits", "labels") if record["box"]][:80]
    for record in cells:
        box = tuple(round(edge * 56) for edge in record["box"])
        cell = load_image(demo / "digits" / record["image"]).crop(box).convert("L")
        assert record["labels"] == [f"digit {known[cell.tobytes()]}"]


def test_clips_hold_each_digit_for_one_pool(demo: Path) -> None:
    """Prevents a pooled frame from mixing two digits, and neighbours from being the same digit."""
    import numpy as np

    captions = {medium(record): answer(record) for record in records(demo, "clips", "captions")}
    for media in list(captions)[:10]:
        frames = [np.asarray(frame).astype(int) for frame in load_video_frames(demo / "clips" / media, Sampling(8))]
        changes = [np.abs(a - b).mean() for a, b in itertools.pairwise(frames)]
        assert all((change > 5) == (index % 2 == 1) for index, change in enumerate(changes))
    for record in good(demo, "clips"):
        shown = captions[medium(record)].removeprefix("The digits shown are ").split(", ")
        assert all(a != b for a, b in itertools.pairwise(shown))
        position = clips.ORDINALS.index(question(record).removesuffix("?").split()[-1])
        assert shown[position] == answer(record)
    for record in records(demo, "clips", "labels"):
        shown = captions[medium(record)].removeprefix("The digits shown are ").split(", ")
        assert record["labels"] == [f"digit {shown[record['frame'] // 2]}"]


def test_answers_are_balanced() -> None:
    """Prevents the most common answer from being a good guess."""
    import random

    counts = Counter(digit for pair in handwriting.answer_pairs(900, random.Random(0)) for digit in pair)
    assert set(counts.values()) == {180}


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents half a source from passing for a whole one, and its remains from disturbing the next build."""
    real = clips.encode

    def stop(path: Path, *rest: Any) -> None:
        if path.name == "0007.mp4":
            raise KeyboardInterrupt
        real(path, *rest)

    monkeypatch.setattr(clips, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        ensure(source("clips", tmp_path))
    assert not (tmp_path / "clips").exists()
    monkeypatch.undo()
    ensure(source("clips", tmp_path))
    assert (tmp_path / "clips/SOURCE.json").exists()
    assert [path.name for path in tmp_path.iterdir() if "building" in path.name] == []


def test_a_finished_source_is_left_alone(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents every run from building the data again, and so from invalidating every later step."""
    monkeypatch.setattr(build_module, "_build", lambda *_: pytest.fail("built again"))
    for name in NAMES:
        ensure(source(name, demo))
    ensure(Source(name="own", kind="image", path=str(demo / "nothing")))
    assert not (demo / "nothing").exists()


def test_other_parameters_build_again(tmp_path: Path) -> None:
    """Prevents a full recipe from running on what a small one left behind."""
    ensure(source("shapes", tmp_path, 0.02))
    ensure(source("shapes", tmp_path, 0.03))
    stamp = json.loads((tmp_path / "shapes/SOURCE.json").read_text())
    assert stamp["parameters"]["scale"] == 0.03 and stamp["records"]["captions"] == 120
    assert len(list((tmp_path / "shapes/images/train").iterdir())) == 120


def test_files_of_the_user_are_never_touched(tmp_path: Path) -> None:
    """Prevents a wrong path in a recipe from deleting somebody's folder."""
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes/thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="other files lie here"):
        ensure(source("shapes", tmp_path))
    assert (tmp_path / "shapes/thesis.txt").read_text() == "years of work"
    assert [path.name for path in (tmp_path / "shapes").iterdir()] == ["thesis.txt"]
