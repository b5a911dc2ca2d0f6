"""Which checkpoint commands and recipes take, and that it is the one that was written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.addresses import sqlite_url
from nvila.components.contracts.errors import DamagedError, DataError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.preflight.checks import weights_problems
from nvila.components.register.package import log_model
from nvila.components.serve.ports import free_port
from nvila.components.serve.server import stop, wait_ready
from nvila.components.serve.weights import main as bring
from nvila.components.tracking.checkpoints import fetch_version, find_model, identity
from nvila.components.tracking.connect import connected
from nvila.components.tracking.registry import DIGEST_TAG, INPUT_TAG, lineage_tags, promote, register_version
from nvila.components.tracking.runs import open_step
from nvila.pipelines.commands import checkpoints


def made(root: Path, weights: str = "weights") -> Manifest:
    folder = root / "store" / "quantize" / "k"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text('{"nvila": {}}')
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
    for take in (lambda: find_model(str(folder), tmp_path), lambda: checkpoints.inspect(str(folder), tmp_path),
                 lambda: checkpoints.convert(str(folder), tmp_path / "out", "native", None, tmp_path)):  # fmt: skip
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


def test_a_recipe_names_a_version_of_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A content key of the name alone would take yesterday's scores for those of today's champion; a name that the
    registry does not have was found out after hours, and a folder of such a name was taken for the version."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    runs, found = tmp_path / "runs", []
    for weights in ("weights", "better"):
        manifest = made(tmp_path / weights, weights)
        tags = lineage_tags({"model": manifest})
        version = register_version(runs, "small", manifest.digest, logged, description="", tags=tags).version
        promote(runs, "small", version)
        assert identity("small@champion", runs) == identity(f"small/{version}", runs) == {"digest": manifest.digest}
        assert fetch_version("small@champion", runs) == (Path(manifest.folder, "model"), {"digest": manifest.digest})
        found.append(manifest.digest)
    assert len(set(found)) == 2 and identity("small/1", runs) == {"digest": found[0]}
    folder = Path(manifest.folder, "model")
    assert fetch_version(str(folder), runs) == (folder, identity(str(folder), runs)) and identity(None, runs) == {}

    shutil.copytree(folder, "small/1")
    assert fetch_version("small/1", runs)[0] != fetch_version("./small/1", runs)[0] == Path("small/1")
    assert weights_problems(["small@champion", "small/1", "./small/1"], runs) == []
    shutil.copytree(folder, "other/7")
    problems = weights_problems(["small@nobody", "other/7"], runs)
    assert len(problems) == 2 and not any("\n" in line for line in problems)
    assert "no version of the registry has this name" in problems[0] and "Registered models: small" in problems[0]
    assert "The folder is ./other/7." in problems[1]
    (folder / "model.safetensors").write_text("WEIGHTS")
    with pytest.raises(DamagedError, match="safetensors"):
        fetch_version("small@champion", runs)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A real MLflow server that keeps the artifacts itself, set as a user sets it; gives the folder of these."""
    url, command = f"http://127.0.0.1:{(port := free_port('127.0.0.1'))}", [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--serve-artifacts"]
    command += ["--backend-store-uri", sqlite_url(tmp_path / "m.db"), "--artifacts-destination", str(tmp_path / "kept")]
    with (tmp_path / "server.log").open("w") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_ready(url, 180, started.pid, tmp_path / "server.log")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
        monkeypatch.setenv("NVILA_CACHE", str(tmp_path / "cache"))
        yield tmp_path / "kept"
    finally:
        stop(started.pid)


@pytest.mark.slow
def test_a_version_of_another_machine_is_brought_here(tmp_path: Path, server: Path) -> None:
    """`nvila infer champion` and `nvila serve champion` ended with 2 wherever the store of the run was not mounted."""
    manifest, runs = made(tmp_path), tmp_path / "runs"

    def log(client: Any) -> dict[str, Any]:
        opened = open_step(client, runs / "r1", "register")
        return log_model(client, manifest, tmp_path / "up", run=opened, name="small", params={}, tags={})

    tags = lineage_tags({"model": manifest})
    promote(runs, "small", register_version(runs, "small", manifest.digest, log, description="", tags=tags).version)
    shutil.move(tmp_path / "store", tmp_path / "there")
    for name in ("champion", "1", "small@champion", "small/1"):
        found = find_model(name, tmp_path / "elsewhere")
        assert (found.folder / "model.safetensors").read_text() == "weights" and found.digest == manifest.digest
        assert (found.name, found.version) == ("small", "1")
    assert find_model(str(found.folder), tmp_path).digest == manifest.digest  # as rollout's start looks at it
    pod = ["--model", "small", "--version", "1", "--digest", manifest.digest, "--into", str(tmp_path / "node")]
    assert bring(pod) == Exit.DONE
    assert (tmp_path / "node" / manifest.digest / "model" / "model.safetensors").read_text() == "weights"
    shutil.rmtree(tmp_path / "node")
    (found.folder / "model.safetensors").write_text("WEIGHTS")
    assert (find_model("champion", runs).folder / "model.safetensors").read_text() == "weights"

    (kept,) = server.rglob("model.safetensors")
    kept.write_text("WEIGHTS")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DamagedError, match="safetensors"):
        find_model("champion", runs)
    assert bring(pod) == Exit.REJECTED
    assert bring([*pod[:3], "2", *pod[4:]]) == Exit.USER
    kept.unlink()
    assert bring(pod) == Exit.USER
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match=r"does not give the file model/model\.safetensors"):
        find_model("champion", runs)
    shutil.copytree(tmp_path / "there", tmp_path / "store")  # mounted again
    assert find_model("champion", runs).folder == Path(manifest.folder, "model")
