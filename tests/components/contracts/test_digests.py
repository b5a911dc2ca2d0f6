"""Digests of files and the index behind them: nothing is read twice for nothing, nothing believed for nothing."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path

import pytest

from nvila.components.contracts import digests
from nvila.components.contracts.digests import file_sha256, medium_sha256, sha256_of
from nvila.components.contracts.index import INDEX


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were read, with an index in a store."""
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("NVILA_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(digests, "SETTLED_NS", -1_000_000_000)  # the files of a test are young
    names: list[str] = []
    genuine = digests.sha256_file
    monkeypatch.setattr(digests, "sha256_file", lambda path: (names.append(Path(path).name), genuine(path))[1])
    return names


def other_process(path: Path, before: str) -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(file_sha256, (path,)) == before


def test_an_unchanged_file_is_read_once_by_all_processes(tmp_path: Path, read: list[str]) -> None:
    """16 GB of weights read by each of twenty steps is three minutes of one core, each time."""
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    expected = hashlib.sha256(b"weights").hexdigest()
    assert [file_sha256(path), file_sha256(path)] == [expected, expected]
    other_process(path, expected)
    assert read == ["a"]
    assert file_sha256(path, fresh=True) == expected and read == ["a", "a"]


@pytest.mark.parametrize("how", ["write", "write, time set back", "replace", "link to another", "swap"])
def test_a_changed_file_is_read_again(tmp_path: Path, read: list[str], how: str) -> None:
    """Sizes and modification times are the two facts that whoever swaps a file keeps."""
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(b"weights")
    other.write_bytes(b"WEIGHTS")
    facts = path.stat()
    os.utime(other, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    file_sha256(path), file_sha256(other)
    if how.startswith("write"):
        path.write_bytes(b"WEIGHTS")
    elif how == "replace":
        other.replace(path)
    elif how == "link to another":
        path.unlink()
        path.symlink_to(other)
    else:
        path.rename(tmp_path / "c")
        other.rename(path)
    if how.endswith("back"):
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert file_sha256(path) == hashlib.sha256(b"WEIGHTS").hexdigest()


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path, read: list[str]) -> None:
    """Written again within the same tick of the clock, it would keep its times and its old digest."""
    digests.SETTLED_NS = 2_000_000_000  # put back by the fixture
    path = tmp_path / "a"
    path.write_bytes(b"weights")
    file_sha256(path), file_sha256(path)
    assert read == ["a", "a"]


@pytest.mark.parametrize(
    "damage",
    ["zeros", "text", "cut", "empty", "another table", "torn", "flipped", "a folder", "not writable", "no store"],
)
def test_a_broken_index_costs_a_reading_and_no_truth(
    tmp_path: Path, read: list[str], damage: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A cache that can stop the work, or vouch for a file that it never saw, is worse than none."""
    import sqlite3

    from nvila.components.contracts import index

    place, path = tmp_path / "store" / INDEX, tmp_path / "a"
    path.write_bytes(b"weights")
    expected = file_sha256(path)
    monkeypatch.setattr(index, "_ours", None)  # as a new process
    content = place.read_bytes()
    if damage == "zeros":
        place.write_bytes(bytes(len(content)))
    elif damage == "text":
        place.write_text("no database" * 100)
    elif damage == "cut":
        place.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        place.write_bytes(b"")
    elif damage == "another table":
        place.unlink()
        sqlite3.connect(place).execute("CREATE TABLE files (name TEXT)")
    elif damage == "torn":  # what SQLite says of it quotes it
        place.write_bytes(content.replace(b"CREATE TABLE", b"CREATE \xffABLE"))
    elif damage == "flipped":
        place.write_bytes(content.replace(expected[:8].encode(), b"00000000"))
    elif damage in ("a folder", "not writable"):
        place.unlink()
        place.mkdir()
        (place / "x").touch()
    else:
        monkeypatch.setenv("NVILA_STORE", str(tmp_path / "none"))
    assert [file_sha256(path), file_sha256(path)] == [expected, expected]
    assert read.count("a") == 2
    said = capfd.readouterr().err
    assert said.count("\n") <= 2
    if damage in ("zeros", "text", "another table", "torn"):
        assert "made anew" in said


def test_many_files_and_odd_names(tmp_path: Path, read: list[str]) -> None:
    """Thousands of pictures, and names that are no UTF-8, are what users have."""
    for number in range(600):
        (tmp_path / f"{number}").write_bytes(b"%d" % number)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    odd.write_bytes(b"odd")
    paths = [*(tmp_path / f"{number}" for number in range(600)), odd]
    found = sha256_of(paths)
    assert list(found) == paths and found[odd] == hashlib.sha256(b"odd").hexdigest()
    assert sha256_of(paths) == found and len(read) == 601


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """Opening a pipe in a folder of pictures waits for ever."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "gone", "."):
        with pytest.raises(OSError):
            file_sha256(tmp_path / name)


def test_a_folder_of_frames_is_its_names_and_bytes(tmp_path: Path) -> None:
    """Two frames exchanged are another clip."""
    for name in "ab":
        (tmp_path / name).write_text(name)
    before = medium_sha256(tmp_path)
    assert medium_sha256(tmp_path / "none") is None and medium_sha256(tmp_path / "a") != before
    (tmp_path / "a").write_text("b")
    (tmp_path / "b").write_text("a")
    assert medium_sha256(tmp_path) != before
