"""Files of a version in MLflow's registry, from wherever its artifacts lie, by plain HTTP: MLflow's library takes two
seconds and 200 MB to say where that is."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from nvila.components.contracts.addresses import file_path
from nvila.components.contracts.environment import Environment, name_of, revealed
from nvila.components.contracts.errors import ConfigError, DataError, NvilaError
from nvila.components.contracts.files import sync
from nvila.components.contracts.places import is_address
from nvila.components.data.remote.insist import CONNECT_SECONDS, READ_SECONDS, insist, said
from nvila.components.data.remote.s3 import Place
from nvila.components.data.remote.s3object import Object, download

MIB = 1 << 20
_PROXIED = "mlflow-artifacts"
"""Scheme of what a tracking server passes on."""
_PROXIED_SECONDS = 600
"""Without a byte for so long a try has failed there: the server brings the whole file from its own store first."""

Tell = Callable[[int], None]
"""Is given how many more bytes have come."""


class Artifacts(Protocol):
    """A folder of a version's files."""

    where: str
    """For messages; without secrets."""

    def fetch(self, name: str, partial: Path, tell: Tell) -> str:
        """Have the file `name` in `partial`, on the disk; returns its sha256. What an earlier try has left there is
        gone on with where the store can do that.

        Raises:
            DataError: there is no such file, or no access.
            Unreachable: no whole file came, in all tries.
            OSError: the disk.
        """
        ...


def of_version(model: str, version: str, here: Environment) -> Artifacts:
    """The files of a version.

    Raises:
        ConfigError: no MLflow server is named, it lets nobody in, or the files lie where this cannot read.
        DataError: it has no such version.
        Unreachable: it does not answer.
    """
    registry = Server(here.mlflow_registry_uri or here.mlflow_tracking_uri or "", here)
    answer = registry.ask("api/2.0/mlflow/model-versions/get-download-uri", {"name": model, "version": version})
    place = str(answer.get("artifact_uri", ""))
    parts = urlsplit(place)
    if parts.scheme == "s3":
        return _Bucket(place)
    if parts.scheme == _PROXIED:
        server = Server(here.mlflow_tracking_uri or "", here)
        return _Proxied(server.at(parts.netloc), parts.path.strip("/"))
    folder = Path(place) if place and not is_address(place) else file_path(place)
    if folder is None:
        raise ConfigError(
            "the files of this version lie where a pod cannot read them",
            where=f"{model} version {version}",
            value=place,
            do="Start MLflow with --serve-artifacts, or with artifacts in s3://, and register the model again.",
        )
    return _Folder(folder)


class Server:
    """An MLflow server."""

    def __init__(self, uri: str, here: Environment) -> None:
        """Nothing is asked yet.

        Raises:
            ConfigError: this is no URL of a server.
        """
        parts = urlsplit(uri)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                "pods ask an MLflow server, by HTTP",
                where=name_of("mlflow_tracking_uri"),
                value=parts.scheme or uri,
                do="Name the URL of one.",
            )
        self._scheme, self._host = parts.scheme, parts.netloc.rpartition("@")[2]
        self._path = parts.path.rstrip("/")
        named = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
        self.headers = {"Accept-Encoding": "identity", **credentials(here, named)}

    @property
    def where(self) -> str:
        """Its URL without secrets."""
        return f"{self._scheme}://{self._host}{self._path}"

    def at(self, host: str) -> Server:
        """The one at this host, which gets no credentials meant for another; this one without a host."""
        if not host or host == self._host:
            return self
        other = object.__new__(Server)
        other._scheme, other._host, other._path = self._scheme, host, ""
        other.headers = {"Accept-Encoding": "identity"}
        return other

    def ask(self, path: str, fields: dict[str, str]) -> dict[str, Any]:
        """JSON of an answer.

        Raises:
            ConfigError, DataError, Unreachable: as `of_version`.
        """

        def asked() -> Any:
            with self.get(path, params=fields) as answer:
                body = answer.content
            try:
                return json.loads(body)
            except ValueError:
                do = f"Look at {name_of('mlflow_tracking_uri')}, and whether a proxy answers in its place."
                raise ConfigError("this is no answer of MLflow's", where=self.where, do=do) from None

        found = insist(asked, passes, f"{self.where}/{path}")
        return found if isinstance(found, dict) else {}

    def get(self, path: str, start: int = 0, *, quiet_seconds: float = READ_SECONDS, **options: Any) -> Any:
        """The answer to one request, whose body is still to be read.

        Args:
            path: below its URL, quoted.
            start: first byte that is asked for.
            quiet_seconds: without a byte for so long, a try has failed.
            options: of `requests`.

        Raises:
            ConfigError, DataError, NvilaError: it refuses.
            _Busy: it cannot answer now, or has not so many bytes.
        """
        import requests

        where = f"{self.where}/{path}"
        more = {"Range": f"bytes={start}-"} if start else {}
        options |= {"headers": self.headers | more, "stream": True, "timeout": (CONNECT_SECONDS, quiet_seconds)}
        try:
            answer = requests.get(where, **options)
        except requests.exceptions.SSLError as error:
            do = "Name the file with its authority's certificate in REQUESTS_CA_BUNDLE."
            raise ConfigError(
                "the server's certificate is not trusted", where=where, value=said(error), do=do
            ) from None
        if answer.status_code in (200, 206):
            return answer
        with answer:
            text = answer.text[:300] if answer.headers.get("content-type", "").startswith("application/json") else ""
        told = f"status {answer.status_code} {text}".strip()
        if answer.status_code in (401, 403):
            do = f"Look at {name_of('mlflow_tracking_uri')} and the credentials for it."
            raise ConfigError("MLflow lets nobody in", where=where, value=told, do=do)
        if answer.status_code == 404:
            raise DataError("MLflow has no such thing", where=where, value=told, do="Register the model again.")
        if start and answer.status_code == 416:
            raise _NothingThere(told)
        if answer.status_code >= 500 or answer.status_code in (408, 429):
            raise _Busy(told)
        raise NvilaError("MLflow does not take this", where=where, value=told)


def credentials(here: Environment, named: str = "") -> dict[str, str]:
    """The header that MLflow's own client would send.

    Args:
        here: the environment.
        named: `user:password` of the server's URL, where it has one.
    """
    pair = named or (f"{here.mlflow_username}:{revealed(here.mlflow_password)}" if here.mlflow_username else "")
    if pair:
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
    return {"Authorization": f"Bearer {revealed(here.mlflow_token)}"} if here.mlflow_token else {}


class _Busy(Exception):
    """No answer now."""


class _NothingThere(_Busy):
    """There are not so many bytes as were fetched: they are of something else."""


def passes(error: Exception) -> bool:
    """Whether the same request may succeed later: the server is away or overloaded, or a connection broke."""
    import requests

    return isinstance(error, requests.exceptions.RequestException | _Busy)


class _Proxied:
    def __init__(self, server: Server, path: str) -> None:
        self._server, self._path, self.where = server, path, f"{server.where}, {_PROXIED}:/{path}"

    def fetch(self, name: str, partial: Path, tell: Tell) -> str:
        path = f"api/2.0/mlflow-artifacts/artifacts/{quote(f'{self._path}/{name}')}"

        def attempt() -> str:
            start = partial.stat().st_size if partial.exists() else 0
            try:
                answer = self._server.get(path, start, quiet_seconds=_PROXIED_SECONDS)
            except _NothingThere:
                partial.unlink()
                raise
            with answer:
                goes_on = str(answer.headers.get("content-range", "")).startswith(f"bytes {start}-")
                return _receive(answer.iter_content(MIB), partial, start if goes_on else 0, tell)

        return insist(attempt, passes, f"{self.where}/{name}")


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder, self.where = folder, str(folder)

    def fetch(self, name: str, partial: Path, tell: Tell) -> str:
        try:
            source = (self._folder / name).open("rb")
        except OSError as error:
            raise DataError("cannot be read", where=str(self._folder / name), value=error.strerror) from error
        with source:
            return _receive(iter(lambda: source.read(MIB), b""), partial, 0, tell)


class _Bucket:
    def __init__(self, place: str) -> None:
        self._place = Place.of(place.removeprefix("s3://"))
        self._objects: dict[str, Object] | None = None
        self.where = self._place.uri

    def fetch(self, name: str, partial: Path, tell: Tell) -> str:
        if self._objects is None:
            self._objects = self._place.objects(("*",))
        if (item := self._objects.get(name)) is None:
            raise DataError("no such object", where=f"{self.where}/{name}", do="Register the model again.")
        tell(item.size_bytes)  # who has no room for it says so before it comes
        return download(self._place.client, self._place.bucket, item, partial)


def _receive(blocks: Iterator[bytes], partial: Path, start: int, tell: Tell) -> str:
    """Write what comes behind the first `start` bytes, hashing; those are read for it."""
    digest = hashlib.sha256()
    with partial.open("r+b" if start else "wb") as stream:
        for at in range(0, start, MIB):
            digest.update(stream.read(min(MIB, start - at)))
        for block in blocks:
            digest.update(block)
            stream.write(block)
            tell(len(block))
        stream.truncate()
    sync(partial)
    return digest.hexdigest()
