from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from telling import validation

from nvila.components.contracts.digests import medium_sha256
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.manifest import File, InputRef, Manifest, describe_files, sha256_file
from nvila.components.contracts.store import Store
from nvila.components.tracking.connect import connected
from nvila.components.tracking.registry import lineage_tags, promote, register_version
from nvila.components.tracking.trace import render, trace


def made(store: Store, step: str, inputs: dict[str, Manifest], sources: list[File] | None = None) -> Manifest:
    folder = store.folder(step, "k" * 64)
    folder.mkdir(parents=True)
    (folder / "data.bin").write_text(step)
    refs = {n: InputRef(step=m.step, uri=f"{m.folder}/manifest.json", digest=m.digest) for n, m in inputs.items()}
    manifest = Manifest(
        step=step, key="k" * 64, kind="dataset", inputs=refs, sources=sources or [], files=describe_files(folder)
    )
    return store.finish(folder, manifest)


@pytest.fixture
def line(tmp_path: Path) -> dict[str, Manifest]:
    """validate <- prune, train <- quantize: a diamond."""
    source = tmp_path / "sft.json"
    source.write_text("[]")
    file = File(uri=str(source), size_bytes=2, sha256=sha256_file(source))
    store = Store(tmp_path / "store")
    validate = made(store, "validate", {}, [file])
    prune = made(store, "prune", {"samples": validate})
    train = made(store, "train", {"samples": validate, "kept": prune})
    return {"validate": validate, "prune": prune, "train": train, "quantize": made(store, "quantize", {"model": train})}


def states(tmp_path: Path, line: dict[str, Manifest], **options: bool) -> dict[str, str]:
    tree = trace(tmp_path / "store", f"{line['quantize'].folder}/manifest.json", **options)
    return {node.step: node.state for node in tree.nodes}


def test_walk_names_each_step_once_and_ends_at_the_source_files(tmp_path: Path, line: dict[str, Manifest]) -> None:
    """A diamond walked as a tree grows without bound on a real run."""
    tree = trace(tmp_path / "store", line["quantize"].folder)
    assert [node.step for node in tree.nodes] == ["quantize", "train", "prune", "validate"]
    assert tree.sound
    text = render(tree)
    assert str(tmp_path / "sft.json") in text
    assert "4 manifests, 1 source files: every manifest's digest and every file's size agrees; --deep reads" in text
    deep = render(trace(tmp_path / "store", line["quantize"].folder, deep=True))
    assert "4 manifests, 1 source files, 0 media files: every digest agrees" in deep


def test_missing_manifest_is_shown_where_it_is_missing(tmp_path: Path, line: dict[str, Manifest]) -> None:
    """A gap in the lineage must not look like its end."""
    shutil.rmtree(line["prune"].folder)
    assert states(tmp_path, line) == {
        "quantize": "sound", "train": "sound", "prune": "missing", "validate": "sound"
    }  # fmt: skip
    tree = trace(tmp_path / "store", line["quantize"].folder)
    assert not tree.sound
    assert "broken at prune" in render(tree)


def test_work_of_an_older_version_is_called_that(tmp_path: Path, line: dict[str, Manifest]) -> None:
    """`damaged` sends people looking for a broken disk."""
    path = Path(line["validate"].folder) / "manifest.json"
    path.write_text('{"schema_version": 1, "step": "validate", "values": {}, "digest": "d"}')
    assert states(tmp_path, line)["validate"] == "older"


def test_altered_manifest_is_found_by_its_reader(tmp_path: Path, line: dict[str, Manifest]) -> None:
    """Lineage that can be edited afterwards proves nothing."""
    forged = line["validate"].model_copy(update={"result": validation({"shapes": {"sft": 1}}, {})})
    forged.save(Path(forged.folder) / "manifest.json")
    assert states(tmp_path, line)["validate"] == "altered"


@pytest.mark.parametrize(
    ("text", "deep", "state"),
    [("longer than it was", False, "damaged"), ("TRAIN", True, "damaged"), ("TRAIN", False, "sound")],
)
def test_altered_file_is_found(tmp_path: Path, line: dict[str, Manifest], text: str, deep: bool, state: str) -> None:
    """Weights swapped under an intact manifest: by size at once, by content with `deep`."""
    Path(line["train"].folder, "data.bin").write_text(text)
    assert states(tmp_path, line, deep=deep)["train"] == state


def test_changed_source_is_shown_but_ours_is_sound(tmp_path: Path, line: dict[str, Manifest]) -> None:
    """Users edit their data after a run; the walk says so without calling the store broken."""
    (tmp_path / "sft.json").write_text("[1]")
    tree = trace(tmp_path / "store", line["quantize"].folder)
    assert tree.sound and not tree.unchanged
    assert "CHANGED SINCE" in render(tree) and "1 of the user's files changed since" in render(tree)


def test_moved_store_is_followed(tmp_path: Path, line: dict[str, Manifest]) -> None:
    """A store copied to another disk keeps its lineage."""
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    moved = Path(line["quantize"].folder.replace("/store/", "/elsewhere/"))
    tree = trace(tmp_path / "elsewhere", str(moved))
    assert [node.state for node in tree.nodes] == ["sound"] * 4


@pytest.mark.parametrize("by", ["path", "alias"])
def test_a_copied_store_is_held_against_its_own_files(
    tmp_path: Path, tracked_run: Path, line: dict[str, Manifest], by: str
) -> None:
    """The copy on the new disk is damaged, and the walk says that all is well: it read the original."""
    runs, copy = tracked_run.parent, tmp_path / "copy"
    tags = lineage_tags({"model": line["quantize"]})
    register_version(runs, "small", line["quantize"].digest, logged, description="card", tags=tags)
    shutil.copytree(tmp_path / "store", copy)
    Path(str(line["train"].folder).replace("/store/", "/copy/"), "data.bin").write_text("TRAIN")
    Path(str(line["prune"].folder).replace("/store/", "/copy/"), "manifest.json").unlink()
    given = ("store", line["quantize"].folder.replace("/store/", "/copy/")) if by == "path" else ("copy", "1")
    tree = trace(tmp_path / given[0], given[1], runs=runs, deep=True)
    assert {node.step: node.state for node in tree.nodes} == {
        "quantize": "sound", "train": "damaged", "prune": "missing", "validate": "sound"
    }  # fmt: skip
    assert trace(tmp_path / "store", "1", runs=runs, deep=True).unchanged
    assert trace(tmp_path / "nowhere", "1", runs=runs, deep=True).unchanged


@pytest.mark.parametrize("damage", ["other bytes", "gone", "a frame"])
def test_deep_reads_the_pictures(tmp_path: Path, damage: str) -> None:
    """A picture swapped after training is another data set; the walk ended at the annotation file."""
    import pyarrow
    import pyarrow.parquet as parquet

    picture, clip = tmp_path / "a.png", tmp_path / "clip"
    picture.write_text("picture")
    clip.mkdir()
    (clip / "0.png").write_text("frame")
    folder = tmp_path / "store" / "validate" / "made"
    folder.mkdir(parents=True)
    digests = [medium_sha256(picture), "", medium_sha256(clip)]
    row = {"root": str(tmp_path), "media": ["a.png", "b.png", "clip"], "media_sha256": digests}
    parquet.write_table(pyarrow.Table.from_pylist([row]), folder / "samples.parquet")
    made = Manifest(step="validate", key="k" * 64, kind="dataset", files=describe_files(folder))
    Store(tmp_path / "store").finish(folder, made)
    assert "0 source files, 2 media files: every digest agrees" in render(trace(tmp_path, str(folder), deep=True))
    if damage == "gone":
        picture.unlink()
    else:
        (picture if damage == "other bytes" else clip / "0.png").write_text("PICTURE")
    tree = trace(tmp_path, str(folder), deep=True)
    assert tree.sound and not tree.unchanged
    assert f"{clip if damage == 'a frame' else picture}    CHANGED SINCE" in render(tree)
    assert trace(tmp_path, str(folder)).unchanged


def test_champion_is_found_through_the_registry(tmp_path: Path, tracked_run: Path, line: dict[str, Manifest]) -> None:
    """`trace champion` must start at what users are served, not at the newest version."""
    runs = tracked_run.parent
    for name in ("train", "quantize"):
        version = register_version(
            runs,
            "small",
            line[name].digest,
            logged,
            description="card",
            tags=lineage_tags({"model": line[name]}),
        )
        if name == "train":
            promote(runs, "small", version.version)
    for reference in ("champion", "1", "small@champion", "small/1"):
        tree = trace(tmp_path / "store", reference, runs=runs)
        assert [node.step for node in tree.nodes] == ["train", "prune", "validate"]
        assert tree.title == "small version 1 (champion)"
    with pytest.raises(ConfigError, match="Registered models: small"):
        trace(tmp_path / "store", "nobody", runs=runs)
    with connected(runs) as client:
        client.create_model_version("small", source="file:///by-hand")
    with pytest.raises(ConfigError, match="not registered by a run"):
        trace(tmp_path / "store", "3", runs=runs)


def test_question_without_a_registry_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped folder must get one clear line, not a new empty database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="Registered models: none"):
        trace(tmp_path / "store", "champion", runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match="no lineage"):
        trace(tmp_path / "store", "hf://owner/name@main", runs=tmp_path / "runs")


def logged(client: Any) -> dict[str, str]:
    model = client.create_logged_model("0", name="small")
    return {"source": "file:///nowhere", "model_id": model.model_id, "run_id": client.create_run("0").info.run_id}
