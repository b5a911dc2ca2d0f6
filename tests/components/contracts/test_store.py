"""Manifests and the store: what counts as finished, and who may say so."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from telling import training

from nvila.components.contracts.errors import DataError, Rejected
from nvila.components.contracts.manifest import File, InputRef, Manifest, describe_files, write_atomic
from nvila.components.contracts.store import MANIFEST, Store

KEY = "0123456789abcdef" * 4


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def finish(store: Store, text: str = "weights", **changes: Any) -> Manifest:
    with store.working("train-1", KEY) as folder:
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "a.bin").write_text(text)
        files = describe_files(folder, ("model/**/*",))
        return store.finish(folder, Manifest(step="train-1", key=KEY, kind="model", files=files, **changes))


def test_only_a_manifest_finishes_work(store: Store) -> None:
    """Work killed before its manifest must not be taken for whole."""
    with store.working("train-1", KEY) as folder:
        (folder / "a.bin").write_text("half")
    assert store.finished("train-1", KEY) is None
    finish(store)
    found = store.finished("train-1", KEY)
    assert found is not None and found.path("model/a.bin").read_text() == "weights"


@pytest.mark.parametrize("harm", ["truncated", "missing", "another key"])
def test_damaged_work_is_not_finished(store: Store, harm: str) -> None:
    """A truncated checkpoint behind an intact manifest would be trained on or served."""
    file = finish(store).path("model/a.bin")
    if harm == "truncated":
        file.write_text("w")
    elif harm == "missing":
        file.unlink()
    else:  # the folder's name is a prefix of the key
        assert store.finished("train-1", KEY[:20] + "f" * 44) is None
        return
    assert store.finished("train-1", KEY) is None


def test_deep_verification_sees_changed_bytes(store: Store) -> None:
    """Bytes of the same number are another model; only the digest tells."""
    manifest = finish(store)
    manifest.path("model/a.bin").write_text("WEIGHTS")
    assert manifest.verify() == []
    assert manifest.verify(deep=True) == ["model/a.bin"]


def test_manifest_appears_whole_or_not_at_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that meets half a manifest, or an old one mixed with the new, fails on good work."""
    finish(store)
    folder = store.folder("train-1", KEY)
    before = (folder / MANIFEST).read_text()

    def cut_off(self: Path, text: str, **_: Any) -> int:
        with self.open("w") as stream:
            stream.write(text[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(OSError, match="no space"):
        write_atomic(folder / MANIFEST, "x" * 100)
    assert (folder / MANIFEST).read_text() == before


def test_digest_does_not_depend_on_place_or_time(store: Store, tmp_path: Path) -> None:
    """The same work done elsewhere or later must find the cached work of later steps."""
    ref = InputRef(step="initialize", uri="/here/manifest.json", digest="d")
    first = finish(store, inputs={"model": ref}, seconds=1.0, created="2026-01-01")
    moved = ref.model_copy(update={"uri": "/there/manifest.json"})
    second = finish(Store(tmp_path / "other"), inputs={"model": moved}, seconds=2.0, created="2027-01-01")
    assert first.folder != second.folder
    assert first.digest == second.digest


@pytest.mark.parametrize(
    "change",
    [{"result": training(final_loss=0.1)}, {"sources": [File(uri="/data/sft.json", size_bytes=1, sha256="0")]}],
    ids=["result", "sources"],
)
def test_digest_depends_on_the_result(store: Store, change: dict[str, Any]) -> None:
    """Equal digests of different results would let later steps keep what they made of the old one."""
    plain = finish(store).digest
    assert finish(store, text="other weights").digest != plain
    assert finish(store, **change).digest != plain


def test_a_manifest_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A file that is no manifest must be named, not crash the reader."""
    path = tmp_path / "manifest.json"
    path.write_text('{"schema_version": 3, "step": "a"}')
    with pytest.raises(DataError, match=str(path)):
        Manifest.load(path)
    with pytest.raises(DataError, match="no manifest here"):
        Manifest.load(tmp_path / "none.json")


def test_a_store_that_was_moved_still_loads(store: Store, tmp_path: Path) -> None:
    """A manifest remembers where it was written; a copied store must find its own files."""
    finish(store)
    moved = Store(tmp_path / "moved")
    shutil.move(store.root, moved.root)
    found = moved.finished("train-1", KEY)
    assert found is not None and found.path("model/a.bin").is_relative_to(moved.root)


def test_tombstones_hold_within_one_run(store: Store) -> None:
    """A retried pod must end at once, and a new run of the user must try again."""
    store.bury("gate", KEY, "run-1", Rejected("too bad", where="a/b", value=0.1, do="Mend it.", details={"lost": 3}))
    buried = store.buried("gate", KEY, "run-1")
    assert isinstance(buried, Rejected) and buried.details == {"lost": 3}
    assert str(buried) == "a/b: too bad (got 0.1). Mend it."
    assert store.buried("gate", KEY, "run-2") is None
    assert store.buried("gate", "f" * 64, "run-1") is None


def test_an_interrupted_removal_leaves_damage_that_is_noticed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest deleted first would turn half a folder into work to be resumed."""
    finish(store)

    def killed(path: Path, **_: Any) -> None:
        raise KeyboardInterrupt

    (store.folder("train-1", KEY) / "a.log").write_text("")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        store.remove("train-1", KEY)
    assert (store.folder("train-1", KEY) / MANIFEST).exists()
    store.remove("train-1", KEY)
    assert not store.folder("train-1", KEY).exists()


def _work(root: Path, log: Path) -> None:
    store = Store(root)
    with store.working("train-1", KEY) as folder:
        if store.finished("train-1", KEY):
            return
        with log.open("a") as stream:
            stream.write("worked\n")
        time.sleep(1.2)
        (folder / "a.bin").write_text("weights")
        store.finish(folder, Manifest(step="train-1", key=KEY, kind="model", files=describe_files(folder, ("*.bin",))))


def test_two_processes_do_the_same_work_once(store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two runs at the same time would write into one folder; one that waits for days without a word looks hung."""
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_work, args=(store.root, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert log.read_text() == "worked\n"
    assert "train-1: another run is at the same work" in capfd.readouterr().err


def test_nodes_that_write_one_file_at_once_do_not_fail(tmp_path: Path) -> None:
    """Ranks of several machines stop together and leave the same verdict; their processes have the same numbers."""
    with ThreadPoolExecutor(4) as nodes:
        for done in [nodes.submit(write_atomic, tmp_path / "verdict.json", "x" * 100) for _ in range(400)]:
            done.result()
    assert [path.name for path in tmp_path.iterdir()] == ["verdict.json"]
