"""Brings weights named by a path, `s3://bucket/prefix` or `hf://id@revision` to a local folder: data files only."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.manifest import sha256_file

WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja")
"""What a checkpoint needs. Code, pickles and anything else are left where they are."""


def fetch(uri: str) -> Path:
    """Local folder with the files of `uri`.

    Downloads go to `NVILA_CACHE` and are taken from there the next time; without it to `~/.cache/nvila`, or to the
    hub's own cache. An interrupted download goes on: within a file from the hub, file by file from S3. `hf://` honours
    `HF_TOKEN` and `HF_HUB_OFFLINE`; `s3://` the usual AWS variables, `AWS_ENDPOINT_URL` among them.

    Raises:
        ConfigError: a URI of another kind.
        DataError: nothing there, or it cannot be reached.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        if not Path(uri).is_dir():
            raise DataError("no such folder of weights", where=uri)
        return Path(uri)
    if scheme == "hf":
        return _from_hub(rest, uri)
    if scheme == "s3":
        return _from_s3(rest, uri)
    raise ConfigError("weights are named by a path, s3://bucket/prefix or hf://id@revision", value=uri)


def identity(uri: str | None) -> dict[str, str]:
    """Digest of each wanted file of a local folder, by relative name; empty for a URI, which names its own content.

    Raises:
        DataError: no such folder.
    """
    if uri is None or "://" in uri:
        return {}
    folder = fetch(uri)
    files = (path for path in folder.rglob("*") if path.is_file() and _is_wanted(path))
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(files)}


def cache() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("NVILA_CACHE", "~/.cache/nvila")).expanduser()


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Hold the cache's lock for a URI: two pods of a node would write the same partial files."""
    path = cache() / "locks" / f"{sha256(uri.encode()).hexdigest()}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _from_hub(name: str, uri: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    place = cache() / "hub" if "NVILA_CACHE" in os.environ else None
    options: dict[str, Any] = {"revision": revision or None, "cache_dir": place, "allow_patterns": list(WANTED)}
    try:
        # The hub's client has locks of its own.
        return Path(snapshot_download(repository, **options))
    except HFValidationError as error:
        raise ConfigError("not a name on the hub", where=uri, do="Write hf://owner/name@revision.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        # Given a commit, the client asks the hub what belongs to it, even where all of it lies in the cache.
        with suppress(LocalEntryNotFoundError, OSError):
            return Path(snapshot_download(repository, **options, local_files_only=True))
        raise DataError(
            "the weights cannot be downloaded from the hub and are not in its cache",
            where=uri,
            value=str(error).splitlines()[0],
            do="Check the name, HF_TOKEN and the network, or name a local folder.",
        ) from error


def _from_s3(name: str, uri: str) -> Path:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, prefix = name.partition("/")
    prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
    target = cache() / "s3" / bucket / prefix
    try:
        client = boto3.client("s3")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        objects = [item for page in pages for item in page.get("Contents", [])]
        wanted = [item for item in objects if _is_wanted(Path(item["Key"]))]
        if not wanted:
            raise DataError("no weights under this prefix", where=uri)
        with alone(uri):
            for item in wanted:
                _download(client, bucket, item, _inside(target, item["Key"].removeprefix(prefix)))
    except (BotoCoreError, ClientError) as error:
        raise DataError("the weights cannot be read from S3", where=uri, value=str(error)) from error
    return target


def _is_wanted(path: Path) -> bool:
    return any(path.match(pattern) for pattern in WANTED)


def _inside(folder: Path, name: str) -> Path:
    """`folder/name`, refused when the object's name leads out of the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError("an object's name leads out of its prefix", value=name)
    return path


def _download(client: Any, bucket: str, item: dict[str, Any], path: Path) -> None:
    """Get one object by rename, unless a file of its size and not older is there."""
    if (
        path.exists()
        and path.stat().st_size == item["Size"]
        and path.stat().st_mtime >= item["LastModified"].timestamp()
    ):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    client.download_file(bucket, item["Key"], str(partial))
    partial.rename(path)
