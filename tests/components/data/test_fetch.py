"""Bringing weights: what is taken, what is refused, and what a failure says."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.data.fetch import fetch, identity


def test_a_path_is_itself(tmp_path: Path) -> None:
    """A local folder must be used where it lies, and a missing one named."""
    assert fetch(str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match="nowhere: no such folder of weights"):
        fetch(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("uri", ["https://host/model", "gs://bucket/model", "file:///model"])
def test_another_scheme_is_refused(uri: str) -> None:
    """A URL that is taken for a path gives a message about a missing folder."""
    with pytest.raises(ConfigError, match=r"hf://id@revision \(got"):
        fetch(uri)


def test_the_hub_offline_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network the user needs the name and the way out, not a stack of HTTP errors."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        DataError, match=r"hf://owner/name@main: the weights cannot be downloaded .*local folder"
    ) as got:
        fetch("hf://owner/name@main")
    assert "\n" not in str(got.value)


@pytest.mark.parametrize("revision", ["main", "0123456789abcdef0123456789abcdef01234567"])
def test_the_cache_of_the_hub_is_enough_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    """Weights that are there must not need the network, named by a branch or pinned to a commit."""
    import huggingface_hub.constants

    monkeypatch.delenv("NVILA_CACHE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    stored = tmp_path / "models--owner--name"
    (stored / "snapshots" / commit).mkdir(parents=True)
    (stored / "snapshots" / commit / "config.json").write_text("{}")
    (stored / "refs").mkdir()
    (stored / "refs/main").write_text(commit)
    assert fetch(f"hf://owner/name@{revision}") == stored / "snapshots" / commit
    assert identity(f"hf://owner/name@{revision}") == {"commit": commit}


def test_identity_is_of_the_bytes_that_count(tmp_path: Path) -> None:
    """A content key over notes beside the weights trains again for a README."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.safetensors").write_bytes(b"1")
    (tmp_path / "notes.md").write_text("n")
    first = identity(str(tmp_path))
    assert list(first) == ["a/x.safetensors"]
    (tmp_path / "a" / "x.safetensors").write_bytes(b"2")
    assert identity(str(tmp_path)) != first
    assert identity(None) == {}


def test_a_folder_is_used_without_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nvila infer FOLDER` must not read 16 GB to answer a question."""
    (tmp_path / "x.safetensors").write_bytes(b"1")
    monkeypatch.setattr("nvila.components.data.fetch.sha256_of", None)
    assert fetch(str(tmp_path)) == tmp_path
