"""An S3 server with faults, and limits that a test can wait for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from buckets import Bucket, served

from nvila.components.data import insist


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test can wait for."""
    monkeypatch.setattr(insist, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(insist, "READ_SECONDS", 0.15)
    monkeypatch.setattr(insist, "CONNECT_SECONDS", 1)


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> Iterator[Bucket]:
    """A bucket `b` with a checkpoint `m/`, and what must not be taken of it."""
    monkeypatch.setenv("NVILA_CACHE", str(tmp_path / "cache"))
    bucket = Bucket()
    for key, body in {
        "m/config.json": b"{}",
        "m/llm/model.safetensors": b"weights",
        "m/llm/merges.txt": b"a b",
        "m/modeling.py": b"raise SystemExit",
        "m/pytorch_model.bin": b"pickle",
        "mm/config.json": b"other",
    }.items():
        bucket.put(key, body)
    with served(bucket):
        for name, value in {
            "AWS_ENDPOINT_URL": bucket.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(tmp_path / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        }.items():
            monkeypatch.setenv(name, value)
        yield bucket
