"""Fills a node's cache with named weights and checks every file's digest: `python -m nvila.components.data.warm FILE`.

FILE is JSON: URI -> file -> SHA-256, as the chart's DaemonSet gets it. What has been checked is noted beside the
weights, so that a node which starts again reads no 16 GB anew. `--digests URI` prints what FILE should say of a URI.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

from nvila.components.contracts.errors import ConfigError, DataError, NvilaError
from nvila.components.contracts.manifest import sha256_file
from nvila.components.contracts.text import visible, visible_lines
from nvila.components.data.fetch import fetch
from nvila.components.data.remote import received
from nvila.components.data.remote.cache import alone, cache
from nvila.components.data.remote.received import Received

USAGE = "usage: python -m nvila.components.data.warm FILE | --digests URI"


def warm(weights: Mapping[str, Mapping[str, str]]) -> None:
    """Fetch each URI into the cache and compare its files with their digests.

    Raises:
        DataError: a file is missing or is another one, or there are weights without a digest.
    """
    for uri, digests in weights.items():
        folder = fetch(uri)
        with alone(f"verify {uri}", uri):
            verify(uri, folder, digests)
        print(visible(f"{uri}: {len(digests)} files verified in {folder}"), flush=True)


def verify(uri: str, folder: Path, digests: Mapping[str, str]) -> None:
    """Compare the files of `folder` with their digests; a file that is another one is removed, to be fetched anew.

    Raises:
        DataError: as `warm`.
    """
    if unnamed := sorted(set(_weights(folder)) - set(digests)):
        raise DataError("weights without a digest", where=uri, value=unnamed, do="Name the digest of every file.")
    note = cache() / "verified" / f"{sha256(uri.encode()).hexdigest()}.json"
    known = received.read(note)
    seen = {}
    for name, digest in sorted(digests.items()):
        path = folder / name
        if not path.is_file():
            raise DataError("a named file is missing", where=uri, value=name)
        state = received.state_of(path)
        now = Received(origin=digest, size_bytes=state[0], sha256=digest, state=state)
        if known.get(name) != now and (found := sha256_file(path)) != digest:
            # Of a link, as the hub's cache has them, the file that it leads to.
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise DataError(
                "a file has another digest; it has been removed",
                where=f"{uri}: {name}",
                value=found,
                do=f"The list says {digest}.",
            )
        seen[name] = now
    received.write(note, seen)


def digests_of(uri: str) -> dict[str, str]:
    """Digest of each weight file of a URI, which is fetched for it."""
    folder = fetch(uri)
    return {name: sha256_file(folder / name) for name in sorted(_weights(folder))}


def _weights(folder: Path) -> Iterator[str]:
    return (path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))


def main(arguments: list[str]) -> None:
    """Entry point; see the module.

    Raises:
        ConfigError: other arguments.
    """
    match arguments:
        case ["--digests", uri]:
            print(json.dumps({uri: digests_of(uri)}, indent=2))
        case [file] if not file.startswith("-"):
            warm(json.loads(Path(file).read_text(encoding="utf-8")))
        case _:
            raise ConfigError(USAGE, value=arguments)


if __name__ == "__main__":
    os.umask(0o002)
    try:
        main(sys.argv[1:])
    except NvilaError as error:
        print(visible_lines(f"warm: {error}"), file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None
