"""The index of digests: what a file with these facts held when it was last read, for all processes at one store.

It is a cache of readings and no record of anything. Whatever is wrong with it, or with the file system that it lies on,
files are read again.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from nvila.components.contracts.environment import current
from nvila.components.contracts.locks import lacking
from nvila.components.contracts.text import say

INDEX = ".digests.sqlite"
WAIT_SECONDS = 10.0
"""How long one process waits for another's transaction."""
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
"""Not a database, a broken one, or one with other tables."""
_TABLE = "CREATE TABLE IF NOT EXISTS files (path BLOB PRIMARY KEY, facts TEXT, sha256 TEXT, proof TEXT) WITHOUT ROWID"

Facts = tuple[int, int, int, int]
"""Size, mtime_ns, ctime_ns, inode of a file. Nobody can set a ctime."""
T = TypeVar("T")


class Index:
    """A connection to the index of a store, or to one in memory; never shared with a forked process."""

    def __init__(self, store: Path | None) -> None:
        self._lock = threading.Lock()
        self._file = store / INDEX if store and store.is_dir() and not lacking(store) else None
        self._connection: sqlite3.Connection | None = None

    def get(self, paths: Iterable[tuple[Path, Facts]]) -> dict[Path, str]:
        """The digests of those files whose facts are still the recorded ones."""
        asked = [(path, os.fsencode(path.absolute()), repr(facts)) for path, facts in paths]

        def read(connection: sqlite3.Connection) -> dict[Path, str]:
            found = {}
            for path, key, facts in asked:
                query = "SELECT sha256, proof FROM files WHERE path = ? AND facts = ?"
                row = connection.execute(query, (key, facts)).fetchone()
                if row and row[1] == _proof(key, facts, row[0]):
                    found[path] = str(row[0])
            return found

        return self._do(read) or {}

    def put(self, found: Iterable[tuple[Path, Facts, str]]) -> None:
        """Remember digests."""
        rows = []
        for path, facts, sha256 in found:
            key = os.fsencode(path.absolute())
            rows.append((key, repr(facts), sha256, _proof(key, repr(facts), sha256)))

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)

        if rows:
            self._do(write)

    def _do(self, act: Callable[[sqlite3.Connection], T]) -> T | None:
        """None where even an index in memory does not do it."""
        with self._lock:
            for _ in range(3):  # as found; made anew where that was damaged; in memory
                try:
                    self._connection = self._connection or self._open()
                    return act(self._connection)
                except (sqlite3.Error, UnicodeError) as error:
                    self._give_up(error)
            return None

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file or ":memory:", timeout=WAIT_SECONDS, check_same_thread=False)
        connection.execute("PRAGMA synchronous = OFF")  # a machine that goes down may cost a reading, never a truth
        connection.execute(_TABLE)
        return connection

    def _give_up(self, error: sqlite3.Error | UnicodeError) -> None:
        """Throw a damaged index away; do without one that cannot be used."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._file is None:
            return
        # Without a code the module had no words: what SQLite says of a damaged index quotes it, and is no UTF-8.
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in _DAMAGED:
            say(f"{self._file}: the index of digests is damaged; it is made anew")
            try:
                for name in (self._file, self._file.with_name(INDEX + "-journal")):
                    name.unlink(missing_ok=True)
                return
            except OSError:
                pass
        say(f"{self._file}: no index of digests: {error}; files are read again")
        self._file = None


def _proof(key: bytes, facts: str, sha256: Any) -> str:
    """A flipped bit of the index must not vouch for a file."""
    return hashlib.sha256(b"\0".join((key, facts.encode(), str(sha256).encode()))).hexdigest()[:16]


_ours: tuple[int, Path | None, Index] | None = None
_inherited: list[Any] = []
"""A fork must neither use nor close its parent's connection."""


def index() -> Index:
    """This process' index of the store that the environment names; in memory where it names none."""
    global _ours
    store = current().store
    if _ours is None or _ours[:2] != (os.getpid(), store):
        if _ours is not None and _ours[0] != os.getpid():
            _inherited.append(_ours)
        _ours = (os.getpid(), store, Index(store))
    return _ours[2]
