"""Puts a dump of the tracking database into the S3 store and keeps the newest: run by the chart's CronJob.

`python -m nvila.infra.backup FILE s3://bucket/prefix --keep N`. Making the dump is Postgres' own work; so is the way
back: `aws s3 cp`, then `pg_restore` into an empty database.
"""

from __future__ import annotations

import argparse
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError, DataError, NvilaError
from nvila.components.contracts.manifest import sha256_file
from nvila.components.tracking.redact import tell

DIGEST = "sha256"
"""Name of the object's metadata with the digest of the dump."""


def store(dump: Path, destination: str, keep: int, now: datetime) -> str:
    """Upload the dump under its time, remove all but the newest `keep`, and return the object's URI.

    Raises:
        ConfigError: the destination is no `s3://bucket/prefix`.
        DataError: the dump is empty, or the store refuses.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = destination.removeprefix("s3://").strip("/").partition("/")
    if not destination.startswith("s3://") or not prefix:
        raise ConfigError("backups go to s3://bucket/prefix", value=destination)
    if not dump.stat().st_size:
        raise DataError("the dump is empty", where=str(dump))
    key = f"{prefix}/{now:%Y%m%dT%H%M%SZ}{dump.suffix}"
    try:
        client = boto3.client("s3")
        client.upload_file(str(dump), bucket, key, ExtraArgs={"Metadata": {DIGEST: sha256_file(dump)}})
        size_bytes = client.head_object(Bucket=bucket, Key=key)["ContentLength"]
        if size_bytes != dump.stat().st_size:
            raise DataError("the stored dump has another size", where=f"s3://{bucket}/{key}", value=size_bytes)
        for old in _backups(client, bucket, prefix, dump.suffix)[:-keep]:
            client.delete_object(Bucket=bucket, Key=old)
    except (BotoCoreError, ClientError) as error:
        raise DataError("the dump cannot be stored", where=destination, value=str(error)) from error
    return f"s3://{bucket}/{key}"


def _backups(client: Any, bucket: str, prefix: str, suffix: str) -> list[str]:
    """Keys of our dumps right under the prefix, oldest first: their names are their times. Others' are left alone."""
    ours = re.compile(re.escape(f"{prefix}/") + r"\d{8}T\d{6}Z" + re.escape(suffix))
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/", Delimiter="/")
    return sorted(item["Key"] for page in pages for item in page.get("Contents", []) if ours.fullmatch(item["Key"]))


def main(arguments: list[str]) -> None:
    """Entry point; see the module."""
    parser = argparse.ArgumentParser(prog="python -m nvila.infra.backup", description=__doc__)
    parser.add_argument("dump", type=Path)
    parser.add_argument("destination")
    parser.add_argument("--keep", type=int, required=True)
    options = parser.parse_args(arguments)
    if options.keep < 1:
        parser.error("--keep is at least 1")
    print(store(options.dump, options.destination, options.keep, datetime.now(UTC)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except NvilaError as error:
        print(tell(f"backup: {error}"), file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None
