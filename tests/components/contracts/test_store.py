"""The store and its manifests."""

import json
import threading
import time
from pathlib import Path

import pytest

from nvila.components.contracts.errors import ConfigError, DataError, Rejected
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import InputRef, Manifest, describe_files, write_atomic
from nvila.components.contracts.store import Store

KEY = "k" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def _finish(store: Store, key: str = KEY) -> Manifest:
    with store.working("train-1", key) as folder:
        (folder / "llm").mkdir(exist_ok=True)
        (folder / "llm" / "model.bin").write_bytes(b"1234")
        manifest = Manifest(step="train-1", key=key, kind="model", files=describe_files(folder))
        return store.finish(folder, manifest)


def test_work_without_a_manifest_is_unfinished(store: Store) -> None:
    """A killed step leaves files behind: they must never be taken for a result."""
    with store.working("train-1", KEY) as folder:
        (folder / "half").write_text("x")
    assert store.finished("train-1", KEY) is None
    _finish(store)
    assert store.finished("train-1", KEY) is not None


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_work_with_damaged_files_is_unfinished(store: Store, damage: str) -> None:
    """Training on half a checkpoint fails late, or not at all."""
    path = _finish(store).path("llm/model.bin")
    path.unlink() if damage == "missing" else path.write_bytes(b"1")
    assert store.finished("train-1", KEY) is None


def test_deep_check_finds_what_sizes_do_not(store: Store) -> None:
    """A flipped bit keeps the size."""
    manifest = _finish(store)
    manifest.path("llm/model.bin").write_bytes(b"1235")
    assert manifest.verify() == [] and manifest.verify(deep=True) == ["llm/model.bin"]


def test_two_keys_that_begin_alike_are_told_apart(store: Store) -> None:
    """The folder is named by part of the key; the manifest holds all of it."""
    _finish(store, "k" * 63 + "a")
    assert store.finished("train-1", "k" * 63 + "b") is None


def test_the_digest_is_of_the_work_not_of_the_execution() -> None:
    """Otherwise repeating a step would repeat everything after it."""

    def made(**facts: object) -> Manifest:
        ref = InputRef(step="base", uri=str(facts.pop("uri", "a")), digest="d")
        return Manifest.model_validate(
            {"step": "s", "key": "k", "kind": "model", "inputs": {"m": ref}, "values": {"a": 1}} | facts
        )

    assert made(seconds=1.0, created="x", folder="f", uri="b").digest == made().digest
    assert made(values={"a": 2}).digest != made().digest
    assert made(key="l").digest != made().digest


def test_missing_names_and_files_are_explained(store: Store) -> None:
    """A KeyError inside a later step would tell nobody what to do."""
    manifest = _finish(store)
    with pytest.raises(DataError, match="names no file"):
        manifest.path("other.bin")
    with pytest.raises(DataError, match="names no files under"):
        manifest.dir("vision_tower")
    assert manifest.dir("llm").is_dir()
    manifest.path("llm/model.bin").unlink()
    with pytest.raises(DataError, match="is gone"):
        manifest.path("llm/model.bin")


@pytest.mark.parametrize("content", ["{", "{}", '{"schema_version": 2, "step": "s", "key": "k", "kind": "model"}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    """A manifest of a later version must not be half understood."""
    path = tmp_path / "manifest.json"
    path.write_text(content)
    with pytest.raises(DataError):
        Manifest.load(path)


def test_readers_see_the_old_or_the_new_file(tmp_path: Path) -> None:
    """The terminal's table reads status files while steps write them."""
    path = tmp_path / "status.json"
    write_atomic(path, json.dumps({"n": 0}))
    seen: list[int] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(json.loads(path.read_text())["n"])

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(300):
        write_atomic(path, json.dumps({"n": number, "padding": "x" * 20_000}))
    stop.set()
    reader.join()
    assert seen == sorted(seen) and [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_the_same_work_waits_and_other_work_does_not(store: Store) -> None:
    """Two runs must not train in one folder; different work must not queue."""
    order: list[str] = []

    def work(key: str, name: str) -> None:
        with store.working("train-1", key):
            order.append(name)
            time.sleep(0.3)
            order.append(f"{name} ends")

    threads = [threading.Thread(target=work, args=args) for args in ((KEY, "a"), (KEY, "b"), ("m" * 64, "other"))]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert order.index("b") > order.index("a ends") > order.index("other")


def test_a_verdict_holds_for_its_run_only(store: Store) -> None:
    """The tombstone ends retries of one run; the next run may have another gate."""
    store.bury("gate", KEY, "run-1", Rejected("too low"))
    assert store.buried("gate", KEY, "run-1") == (Exit.REJECTED, "too low")
    assert store.buried("gate", KEY, "run-2") is None


def test_removed_work_is_gone(store: Store) -> None:
    """Garbage collection and repair rely on it."""
    manifest = _finish(store)
    store.remove("train-1", KEY)
    assert not Path(manifest.folder).exists() and store.finished("train-1", KEY) is None


def test_messages_say_what_where_value_and_what_to_do() -> None:
    """The four parts of every message, in one line."""
    error = ConfigError("must be positive", where="train.batch", value=-1, do="Give a number above 0.")
    assert str(error) == "train.batch: must be positive (got -1). Give a number above 0."
    assert len(str(ConfigError("too long", value="x" * 10_000))) < 300
