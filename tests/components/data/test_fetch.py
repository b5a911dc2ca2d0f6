"""Bringing weights: what is taken, what is refused, and what a failure says."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.data.fetch import fetch, identity


class Bucket:
    """The two calls of boto3's client that are made here, over a dictionary."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects
        self.downloads: list[str] = []
        self.written = datetime(2026, 1, 1, tzinfo=UTC)

    def get_paginator(self, name: str) -> Bucket:
        assert name == "list_objects_v2"
        return self

    def paginate(self, *, Bucket: str, Prefix: str) -> list[dict[str, Any]]:
        found = [
            {"Key": key, "Size": len(content), "LastModified": self.written}
            for key, content in self.objects.items()
            if key.startswith(Prefix)
        ]
        return [{"Contents": [item]} for item in found] or [{}]

    def download_file(self, bucket: str, key: str, path: str) -> None:
        self.downloads.append(key)
        Path(path).write_bytes(self.objects[key])


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    import boto3

    monkeypatch.setenv("NVILA_CACHE", str(tmp_path / "cache"))
    found = Bucket(
        {
            "m/config.json": b"{}",
            "m/llm/model.safetensors": b"weights",
            "m/llm/merges.txt": b"a b",
            "m/modeling.py": b"raise SystemExit",
            "m/pytorch_model.bin": b"pickle",
            "mm/config.json": b"other",
        }
    )
    monkeypatch.setattr(boto3, "client", lambda service: found)
    return found


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


def test_only_data_files_are_taken_from_s3(bucket: Bucket) -> None:
    """Code and pickles of a checkpoint must not even arrive; a longer prefix is another model."""
    folder = fetch("s3://b/m/")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == ["config.json", "llm/merges.txt", "llm/model.safetensors"]
    assert (folder / "llm" / "model.safetensors").read_bytes() == b"weights"


def test_what_is_there_is_not_fetched_again_unless_it_changed(bucket: Bucket) -> None:
    """A hundred gigabytes once, and never the old bytes of an overwritten object."""
    folder = fetch("s3://b/m")
    fetch("s3://b/m")
    assert len(bucket.downloads) == 3
    bucket.objects["m/config.json"] = b"[]"
    stamp = bucket.written.timestamp()
    os.utime(folder / "config.json", (stamp - 1, stamp - 1))
    assert fetch("s3://b/m") == folder
    assert bucket.downloads[3:] == ["m/config.json"]
    assert (folder / "config.json").read_bytes() == b"[]"


def test_a_download_that_breaks_off_leaves_no_file(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a file under the final name is taken for the whole one the next time."""
    from botocore.exceptions import EndpointConnectionError

    def broken(name: str, key: str, path: str) -> None:
        Path(path).write_bytes(b"wei")
        raise EndpointConnectionError(endpoint_url="http://s3")

    monkeypatch.setattr(bucket, "download_file", broken)
    with pytest.raises(DataError, match="s3://b/m: the weights cannot be read from S3"):
        fetch("s3://b/m")
    assert [path.suffix for path in (tmp_path / "cache" / "s3").rglob("*") if path.is_file()] == [".partial"]


@pytest.mark.parametrize("name", ["m/../../../evil.json", "m//etc/evil.json"])
def test_an_object_cannot_leave_its_folder(bucket: Bucket, tmp_path: Path, name: str) -> None:
    """A name in somebody's bucket must not overwrite files of this machine."""
    bucket.objects[name] = b"evil"
    with pytest.raises(DataError, match="leads out of its prefix"):
        fetch("s3://b/m")
    assert not list(tmp_path.rglob("evil.json*"))


def test_a_whole_bucket_and_an_empty_prefix(bucket: Bucket) -> None:
    """`s3://bucket` without a prefix is a place too; a prefix without weights is an error."""
    assert (fetch("s3://b") / "mm" / "config.json").read_bytes() == b"other"
    with pytest.raises(DataError, match="s3://b/none: no weights under this prefix"):
        fetch("s3://b/none")


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


@pytest.mark.parametrize("uri", ["hf://a/b/c", "hf://bad name"])
def test_a_name_that_the_hub_cannot_have_is_refused(uri: str) -> None:
    """A typing error in the recipe is not a network problem."""
    with pytest.raises(ConfigError, match="not a name on the hub"):
        fetch(uri)


def test_identity_is_of_the_bytes_that_count(tmp_path: Path) -> None:
    """A content key over notes beside the weights trains again for a README."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.safetensors").write_bytes(b"1")
    (tmp_path / "notes.md").write_text("n")
    first = identity(str(tmp_path))
    assert list(first) == ["a/x.safetensors"]
    (tmp_path / "a" / "x.safetensors").write_bytes(b"2")
    assert identity(str(tmp_path)) != first
    assert identity(None) == identity("hf://a/b@main") == {}
