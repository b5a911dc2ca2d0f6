"""Paths and hosts as URLs, and back: no character of a name means anything there. Nothing else of ours builds these."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit


def file_url(path: Path) -> str:
    """`file://` of a file or folder."""
    return path.absolute().as_uri()


def file_path(url: str) -> Path | None:
    """The path that a `file:` URL means; None for any other address."""
    parts = urlsplit(url)
    return Path(unquote(parts.path, errors="surrogateescape")) if parts.scheme == "file" else None


def sqlite_url(path: Path, *, locks: bool = True) -> str:
    """What SQLAlchemy takes for a database file; without `locks` it is never locked, and others must see to that."""
    name = quote(os.fsencode(path.absolute()))
    return f"sqlite:///{name}" if locks else f"sqlite:///file:{quote(name)}?vfs=unix-none&uri=true"


def http_url(host: str, port: int) -> str:
    """Base URL of a server: a host name or an address, IPv6 without brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def below(url: str, name: str) -> str:
    """The URL of the file `name` below a folder's URL; an object store's keys stand in its URLs as they are."""
    return f"{url.rstrip('/')}/{quote(name) if urlsplit(url).scheme == 'file' else name}"


def host_and_port(place: str) -> tuple[str, int]:
    """The two of `host:port`; an IPv6 address stands in brackets there, and here without.

    Raises:
        ValueError: it is not of this form.
    """
    found = urlsplit(f"//{place}")
    if not found.hostname or not found.port or found.netloc != place or "@" in place:
        raise ValueError(f"{place!r} is not host:port")
    return found.hostname, found.port
