"""Brings weights named by a path, `s3://bucket/prefix` or `hf://id@revision` to a local folder: data files only."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from nvila.components.contracts.digests import sha256_of
from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.data.remote import hub, s3
from nvila.components.data.remote.wanted import DESCRIBING, is_wanted


def fetch(uri: str) -> Path:
    """Local folder with the files of `uri`.

    Downloads go to `NVILA_CACHE` and are taken from there the next time; without it to `~/.cache/nvila`, or to the
    hub's own cache. What was replaced at its origin is fetched again, what was removed there is removed. An interrupted
    download goes on. `hf://` honours `HF_TOKEN` and `HF_HUB_OFFLINE`; `s3://` the usual AWS variables,
    `AWS_ENDPOINT_URL` among them.

    Raises:
        ConfigError: a URI of another kind.
        DataError: nothing there, or no access.
        Unreachable: the service does not answer, or sends other bytes than it says.
        NvilaError: the cache cannot be written.
    """
    service, name = _door(uri)
    return _folder(uri) if service is None else Path(service.fetch(name)[0])


def fetch_description(uri: str) -> Path:
    """As `fetch`, without the weights: a local folder with the files that say what they are."""
    service, name = _door(uri)
    return _folder(uri) if service is None else Path(service.fetch(name, DESCRIBING)[0])


def fetch_version(uri: str) -> tuple[Path, dict[str, str]]:
    """As `fetch`, with the `identity` of what was fetched: it may have changed since a content key was taken of it."""
    service, name = _door(uri)
    if service is None:
        return _folder(uri), _digests(uri)
    folder, version = service.fetch(name)
    return folder, version


def identity(uri: str | None) -> dict[str, str]:
    """What `uri` holds now, without fetching it: changes whenever a wanted file does.

    Of a local folder the digest of each wanted file by relative name, of S3 the version of each wanted object, of the
    hub the commit; empty for None.

    Raises:
        DataError, ConfigError, Unreachable: as `fetch`.
    """
    if uri is None:
        return {}
    service, name = _door(uri)
    found: dict[str, str] = service.identity(name) if service else _digests(uri)
    return found


def _door(uri: str) -> tuple[ModuleType | None, str]:
    """The service, or None for a path, and what follows the scheme."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return None, uri
    service = {"hf": hub, "s3": s3}.get(scheme)
    if service is None or not rest.strip("/"):
        raise ConfigError("weights are named by a path, s3://bucket/prefix or hf://id@revision", value=uri)
    return service, rest


def _folder(uri: str) -> Path:
    if not Path(uri).is_dir():
        raise DataError("no such folder of weights", where=uri)
    return Path(uri)


def _digests(uri: str) -> dict[str, str]:
    folder = _folder(uri)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and is_wanted(path.name))
    return {path.relative_to(folder).as_posix(): sha256 for path, sha256 in sha256_of(files).items()}
