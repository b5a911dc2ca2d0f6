"""A short text in a bucket, such as a recipe: read as it is now, kept nowhere."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from nvila.components.data.remote.insist import insist
from nvila.components.data.remote.s3client import asked, connect, passes

SCHEME = "s3://"


def read_bytes(address: str, most: int) -> bytes:
    """The object at `s3://bucket/key`, or the first `most` bytes of it.

    Raises:
        DataError: it is not there, or the server refuses.
        Unreachable: the server does not answer.
    """
    bucket, _, key = address.removeprefix(SCHEME).partition("/")
    client = connect()

    def received() -> bytes:
        answer: Any = client.get_object(Bucket=bucket, Key=key)
        with closing(answer["Body"]) as body:
            return bytes(body.read(most))

    return asked(lambda: insist(received, passes, address), address)
