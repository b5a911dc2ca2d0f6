"""Files of a version that lie in an object store or a folder, piece by piece and within a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import NvilaError, Unreachable
from nvila.components.contracts.foreign import reading, require_regular

_BLOCK = 1 << 16


def from_s3(url: str, most_bytes: int) -> Iterator[bytes]:
    """An object by its URL.

    Raises:
        Unreachable: the store does not answer.
        DataError: it refuses.
        NvilaError: the object is larger.
    """
    from nvila.components.data.remote.s3client import asked, connect, passes

    def ask(attempt: Callable[[], Any]) -> Any:
        try:
            return asked(attempt, url)
        except NvilaError as error:
            if isinstance(error.__cause__, Exception) and passes(error.__cause__):
                raise Unreachable(error.what, where=url, value=error.value) from error
            raise

    bucket, _, key = url.removeprefix("s3://").partition("/")
    client = connect()
    with closing(ask(lambda: client.get_object(Bucket=bucket, Key=key))["Body"]) as body:
        yield from bounded(iter(lambda: ask(lambda: body.read(_BLOCK)), b""), most_bytes, url)


def from_disk(path: Path, most_bytes: int) -> Iterator[bytes]:
    """A regular file.

    Raises:
        DataError: it cannot be read.
        NvilaError: it is larger.
    """
    with reading(path):
        require_regular(path)
        with path.open("rb") as stream:
            yield from bounded(iter(lambda: stream.read(_BLOCK), b""), most_bytes, str(path))


def bounded(pieces: Iterator[bytes], most_bytes: int, where: str) -> Iterator[bytes]:
    """The same pieces.

    Raises:
        NvilaError: there are more bytes of them.
    """
    size = 0
    for piece in pieces:
        if (size := size + len(piece)) > most_bytes:
            raise NvilaError(f"larger than {most_bytes:,} bytes", where=where)
        yield piece
