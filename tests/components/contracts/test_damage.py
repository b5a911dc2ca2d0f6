"""Each way in which work in the store can be spoilt, and who finds it: who skips it, and who opens it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from telling import training

from nvila.components.contracts.errors import DamagedError, DataError, NvilaError
from nvila.components.contracts.files import read_json, write_atomic
from nvila.components.contracts.manifest import SUSPECT, File, Manifest, describe_files, written_by
from nvila.components.contracts.results.result import Other
from nvila.components.contracts.store import MANIFEST, TOMBSTONE, Store

KEY = "0123456789abcdef" * 4
Harm = Callable[[Path], Any]


@pytest.fixture
def made(tmp_path: Path) -> Manifest:
    """Finished work: two files of equal size in `model/`, one beside."""
    store = Store(tmp_path / "store")
    with store.working("train-1", KEY) as folder:
        for name, text in (("model/a.bin", "weights"), ("model/b.bin", "WEIGHTS"), ("loss.jsonl", "{}")):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        files = describe_files(folder, ("model/**/*", "loss.jsonl"))
        return store.finish(folder, Manifest(step="train-1", key=KEY, kind="model", files=files, result=training()))


def flip(folder: Path) -> None:
    path = folder / "model" / "a.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def keep_times(harm: Harm) -> Harm:
    def harmed(folder: Path) -> None:
        facts = (folder / "model" / "a.bin").stat()
        harm(folder)
        os.utime(folder / "model" / "a.bin", ns=(facts.st_atime_ns, facts.st_mtime_ns))

    return harmed


def swap(folder: Path) -> None:
    a, b = folder / "model" / "a.bin", folder / "model" / "b.bin"
    a.rename(folder / "c")
    b.rename(a)
    (folder / "c").rename(b)


def link_file(folder: Path) -> None:
    (folder / "model" / "a.bin").rename(folder / "elsewhere.bin")
    (folder / "model" / "a.bin").symlink_to(folder / "elsewhere.bin")


def link_folder(folder: Path) -> None:
    shutil.copytree(folder / "model", folder.parent / "elsewhere")
    shutil.rmtree(folder / "model")
    (folder / "model").symlink_to(folder.parent / "elsewhere")


def put_folder(folder: Path) -> None:
    (folder / "model" / "a.bin").unlink()
    (folder / "model" / "a.bin").mkdir()


SAME_SIZE: dict[str, Harm] = {
    "one bit": flip,
    "one bit, time set back": keep_times(flip),
    "zeros": lambda folder: (folder / "model" / "a.bin").write_bytes(bytes(7)),
    "cut and filled up": lambda folder: (folder / "model" / "a.bin").write_bytes(b"wei" + bytes(4)),
    "another of its files": lambda folder: shutil.copy(folder / "model" / "b.bin", folder / "model" / "a.bin"),
    "two files exchanged": swap,
}
OTHER_FACTS: dict[str, Harm] = {
    "shorter": lambda folder: (folder / "model" / "a.bin").write_text("w"),
    "gone": lambda folder: (folder / "model" / "a.bin").unlink(),
    "a link to the same bytes": link_file,
    "a linked folder": link_folder,
    "a folder in its place": put_folder,
}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("harm", SAME_SIZE | OTHER_FACTS)
@pytest.mark.parametrize("open_it", [lambda m, f: m.path("model/a.bin", fresh=f), lambda m, f: m.dir("model", fresh=f)])
def test_damage_is_found_by_who_opens_it_and_the_work_is_done_again(
    made: Manifest, harm: str, fresh: bool, open_it: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped byte was trained on, promoted and served; or it was found by each run anew, for ever."""
    open_it(made, False)
    (SAME_SIZE | OTHER_FACTS)[harm](Path(made.folder))
    with pytest.raises(DamagedError, match=r"model/(a|b)\.bin.*Run the recipe again") as error:
        open_it(made, fresh)
    assert error.value.exit_code == 1
    store = Store(Path(made.folder).parents[1])
    store.mend("train-1", KEY)
    assert store.finished("train-1", KEY) is None
    said = capsys.readouterr().err
    assert said.startswith("train-1: damaged, to be done again: ") and said.count("\n") == 1


@pytest.mark.parametrize("harm", OTHER_FACTS)
def test_who_skips_the_work_sees_sizes_and_links(made: Manifest, harm: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint cut short behind a whole manifest would be skipped, and every step behind it too."""
    OTHER_FACTS[harm](Path(made.folder))
    assert Store(Path(made.folder).parents[1]).finished("train-1", KEY) is None
    assert "a.bin" in capsys.readouterr().err


def test_a_file_that_no_step_wrote_is_not_loaded(made: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    """Loaders take every `*.safetensors` of a folder. The work itself is whole, and is not done again for it."""
    extra = Path(made.folder, "model", "model-00002.safetensors")
    extra.write_text("more")
    store = Store(Path(made.folder).parents[1])
    assert made.path("model/a.bin").exists()
    with pytest.raises(DamagedError, match=r"model-00002.*no such file"):
        made.dir("model")
    assert store.finished("train-1", KEY) is None
    store.mend("train-1", KEY)
    assert store.finished("train-1", KEY) == made and not extra.exists()
    assert "deleted, as no step wrote it" in capsys.readouterr().err


def edited(folder: Path, own_digest: bool, **changes: Any) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    for name, value in changes.items():
        content[name] = value
    if own_digest:
        del content["digest"]
        content = json.loads(Manifest.model_validate(content).model_dump_json())
    (folder / MANIFEST).write_text(json.dumps(content))


BROKEN: dict[str, Harm] = {
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_text(path.read_text()[:200]),
    "zeros": lambda path: path.write_bytes(bytes(300)),
    "no UTF-8": lambda path: path.write_bytes(b'{"step": "\xff\xfe"}'),
    "a list": lambda path: path.write_text("[1]"),
    "null": lambda path: path.write_text("null"),
    "another shape": lambda path: path.write_text('{"schema_version": 2, "digest": "", "step": 5}'),
    "deep": lambda path: path.write_text("[" * 100_000),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "x").touch()),
    "a link": lambda path: (path.rename(path.with_name("other")), path.symlink_to("other")),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path)),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "huge": lambda path: os.truncate(path, 2**40),
    "edited": lambda path: edited(path.parent, False, result=training(final_loss=0.01).model_dump()),
    "its digest taken out": lambda path: path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "digest"})
    ),
    "of another key": lambda path: edited(path.parent, True, key=KEY[:20] + "f" * 44),
    "of another step": lambda path: edited(path.parent, True, step="train-2"),
    "made from another input": lambda path: edited(
        path.parent, True, inputs={"model": {"step": "initialize", "uri": "/x", "digest": "d"}}
    ),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_a_broken_manifest_is_named_and_the_work_done_again(
    made: Manifest, harm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A crash left an empty file, and every further run of the recipe ended there."""
    store, folder = Store(Path(made.folder).parents[1]), Path(made.folder)
    BROKEN[harm](folder / MANIFEST)
    assert store.finished("train-1", KEY, {}) is None
    said = capsys.readouterr().err
    assert str(folder) in said and said.count("\n") == 1
    store.remove("train-1", KEY)
    assert not os.path.lexists(folder)


def test_a_newer_manifest_is_refused_and_kept(made: Manifest) -> None:
    """An older version that deletes the work of a newer one destroys weeks."""
    store, path = Store(Path(made.folder).parents[1]), Path(made.folder, MANIFEST)
    edited(path.parent, False, schema_version=3, more={"of": "it"})
    with pytest.raises(DataError, match=r"newer version.*another store") as error:
        store.finished("train-1", KEY)
    assert error.value.exit_code == 2 and path.exists()


@pytest.mark.parametrize("uri", ["../../base/k/model", "/etc/passwd", "a/../../b", "", ".", "a//b", "./a", "a/"])
def test_a_manifest_names_nothing_outside_of_its_folder(made: Manifest, uri: str) -> None:
    """`uri: ../../..` was followed to any file of the machine."""
    files = {"model/a.bin": {"uri": uri, "size_bytes": 7, "sha256": "0" * 64}}
    with pytest.raises(ValueError, match="not below"):
        Manifest(step="a", key="b", kind="model", files={"x": File(**files["model/a.bin"])})
    edited(Path(made.folder), False, files=files)
    with pytest.raises(DamagedError):
        Manifest.load(Path(made.folder, MANIFEST))


@pytest.mark.parametrize("name", ["../x", "a/b", "", "/etc"])
def test_a_manifest_of_a_step_that_is_a_path_is_refused(name: str) -> None:
    """Step and key are names of folders."""
    with pytest.raises(ValueError, match="plain name"):
        Manifest(step=name, key="k", kind="model")
    with pytest.raises(ValueError, match="plain name"):
        Manifest(step="a", key=name, kind="model")


def test_numbers_that_are_none_keep_the_digest(tmp_path: Path) -> None:
    """A loss that is not finite was read back as null: other content, another digest, damaged for ever."""
    made = Manifest(step="a", key="k", kind="metrics", result=Other(loss=float("nan"), low=float("-inf"), n=(1, 2)))
    made.save(tmp_path / "m.json")
    assert Manifest.load(tmp_path / "m.json").digest == made.digest


def test_a_linked_work_folder_is_unlinked_and_not_emptied(made: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    """Clearing away what a link leads to would delete files of somebody else."""
    store, folder = Store(Path(made.folder).parents[1]), Path(made.folder)
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")
    assert store.finished("train-1", KEY) is None
    with store.working("train-1", KEY) as place:
        assert list(place.iterdir()) == []
    assert (folder.parent / "elsewhere" / "model" / "a.bin").exists()
    assert "link" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"run": "r"}', '{"run": "r", "exit_code": 0}', "folder", "pipe", "\0\0"]
)
def test_a_broken_tombstone_holds_nothing_up(tmp_path: Path, content: str) -> None:
    """A verdict that nobody can read any more must not stop the step, nor end it with success."""
    store = Store(tmp_path)
    path = store.folder("gate", KEY) / TOMBSTONE
    path.parent.mkdir(parents=True)
    made = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}
    made.get(content, lambda: write_atomic(path, content))()
    assert store.buried("gate", KEY, "r") is None


def test_a_checkpoint_folder_is_held_against_its_manifest(made: Manifest, tmp_path: Path) -> None:
    """`serve` and `infer` are given folders: one that a step wrote has a manifest beside it."""
    folder = Path(made.folder, "model")
    found = written_by(folder)
    assert found is not None and found.digest == made.digest
    shutil.copytree(folder, tmp_path / "by-hand")
    assert written_by(tmp_path / "by-hand") is None
    (tmp_path / "link").symlink_to(folder)
    (folder / "sub").mkdir()
    keep_times(flip)(Path(made.folder))
    for same in (folder, tmp_path / "link", folder / "sub" / ".."):
        with pytest.raises(DamagedError, match=r"a\.bin"):
            written_by(same)
    assert Path(made.folder, SUSPECT).exists()


def test_a_step_leaves_no_link(tmp_path: Path) -> None:
    """What a link leads to is changed or gone tomorrow."""
    (tmp_path / "a").symlink_to("/etc/hostname")
    with pytest.raises(NvilaError, match="must not leave a link"):
        describe_files(tmp_path)


def test_records_are_on_disk_before_they_have_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renamed first, a file is empty after a power cut; a manifest that is there before its files vouches for none."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    write_atomic(tmp_path / "a.json", "{}")
    assert len(synced) == 2 and ".partial" in synced[0] and synced[1] == str(tmp_path)
    synced.clear()
    store = Store(tmp_path / "store")
    with store.working("train-1", KEY) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "a.bin").write_text("weights")
        store.finish(folder, Manifest(step="train-1", key=KEY, kind="model", files=describe_files(folder)))
    order = [Path(path).name.partition(".partial")[1] or Path(path).name for path in synced]
    assert {"a.bin", "model"} <= set(order[: order.index(".partial")])


def test_torn_records_are_passed_over_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status files, run records and the like: small, many, and what a crash tears first."""
    assert read_json(tmp_path / "none.json") == {} and capsys.readouterr().err == ""
    for number, content in enumerate((b"", b"{", bytes(20), b"\xff", b"[1]", b"7")):
        (tmp_path / f"{number}.json").write_bytes(content)
        assert read_json(tmp_path / f"{number}.json") == {}
        assert "passed over" in capsys.readouterr().err
    assert read_json(tmp_path) == {}
