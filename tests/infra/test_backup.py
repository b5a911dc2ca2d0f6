"""Which dumps a backup keeps; that a real one is stored and read back is shown on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest

from nvila.infra import backup


class Bucket(dict[str, int]):
    """Stands for the S3 client: sizes of objects by key."""

    def upload_file(self, file: str, bucket: str, key: str, ExtraArgs: dict[str, Any]) -> None:
        self[key] = Path(file).stat().st_size

    def head_object(self, Bucket: str, Key: str) -> dict[str, int]:
        return {"ContentLength": self[Key]}

    def delete_object(self, Bucket: str, Key: str) -> None:
        del self[Key]

    def get_paginator(self, name: str) -> Bucket:
        return self

    def paginate(self, Bucket: str, Prefix: str, Delimiter: str) -> Iterator[dict[str, Any]]:
        yield {"Contents": [{"Key": key} for key in self if key.startswith(Prefix)]}


def test_dumps_of_other_names_neither_count_nor_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that somebody kept beside the backups took their places: each new dump was deleted as the oldest."""
    bucket = Bucket({"b/mlflow/before-upgrade.dump": 1, "b/mlflow/0-first.dump": 1})
    monkeypatch.setattr(boto3, "client", lambda service: bucket)
    dump = tmp_path / "mlflow.dump"
    dump.write_bytes(b"dump")
    for day in (1, 2, 3):
        backup.store(dump, "s3://team/b/mlflow", 2, datetime(2026, 11, day, tzinfo=UTC))
    names = sorted(key.rpartition("/")[2] for key in bucket)
    assert names == ["0-first.dump", "20261102T000000Z.dump", "20261103T000000Z.dump", "before-upgrade.dump"]
