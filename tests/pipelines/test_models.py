"""Which checkpoint `serve`, `infer`, `convert` and `inspect` take, and that it is the one that was written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import DamagedError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.tracking.connect import connected
from nvila.components.tracking.registry import DIGEST_TAG, INPUT_TAG, lineage_tags, promote, register_version
from nvila.pipelines.commands import checkpoints
from nvila.pipelines.commands.models import find_model


def made(root: Path, weights: str = "weights") -> Manifest:
    folder = root / "store" / "quantize" / "k"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_text(weights)
    manifest = Manifest(step="quantize", key="k" * 64, kind="model", files=describe_files(folder), folder=str(folder))
    manifest.save(folder / "manifest.json")
    return manifest


def logged(client: Any) -> dict[str, str]:
    model = client.create_logged_model("0", name="small")
    return {"source": "file:///nowhere", "model_id": model.model_id, "run_id": client.create_run("0").info.run_id}


def test_a_folder_of_the_store_is_read_before_it_is_used(tmp_path: Path) -> None:
    """`nvila serve FOLDER` took whatever lay there."""
    manifest = made(tmp_path)
    folder = Path(manifest.folder, "model")
    assert find_model(str(folder), tmp_path).digest == manifest.digest
    (folder / "model.safetensors").write_text("WEIGHTS")
    for take in (lambda: find_model(str(folder), tmp_path), lambda: checkpoints.inspect(str(folder)),
                 lambda: checkpoints.convert(str(folder), tmp_path / "out", "native", None)):  # fmt: skip
        with pytest.raises(DamagedError, match="safetensors"):
            take()


def test_a_folder_from_elsewhere_is_known_by_its_bytes(tmp_path: Path) -> None:
    """Known by sizes, a server of the old weights was taken for one of the new."""
    shutil.move(Path(made(tmp_path).folder, "model"), tmp_path / "mine")
    first = find_model(str(tmp_path / "mine"), tmp_path).digest
    (tmp_path / "mine" / "model.safetensors").write_text("WEIGHTS")
    assert find_model(str(tmp_path / "mine"), tmp_path).digest != first


def test_a_registered_model_is_the_one_that_was_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and manifest exchanged together fit each other; only the registry knows better."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    manifest, runs = made(tmp_path), tmp_path / "runs"
    tags = lineage_tags({"model": manifest})
    promote(runs, "small", register_version(runs, "small", manifest.digest, logged, description="", tags=tags).version)
    assert find_model("champion", runs).digest == manifest.digest
    for tag, edited in ((DIGEST_TAG, "0" * 64), (INPUT_TAG + "model", "{}")):
        with connected(runs) as client:
            kept = client.get_model_version("small", "1").tags[tag]
            client.set_model_version_tag("small", "1", tag, edited)
        with pytest.raises(DamagedError, match="the version's tags were edited"):
            find_model("champion", runs)
        with connected(runs) as client:
            client.set_model_version_tag("small", "1", tag, kept)
    Path(manifest.folder, "model", "model.safetensors").write_text("WEIGHTS")
    with pytest.raises(DamagedError, match="safetensors"):
        find_model("champion", runs)
    shutil.rmtree(manifest.folder)
    made(tmp_path, "WEIGHTS")
    with pytest.raises(DamagedError, match="not the model that was registered"):
        find_model("champion", runs)
