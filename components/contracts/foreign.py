"""Files that others wrote, read with a doubt: of a bounded size, JSON that means one thing, errors that name the place.

Which names a checkpoint has is said in `model/checkpoint`; what a step of ours wrote is read by `files` and `manifest`.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import DataError, NvilaError

MOST_BYTES = 2**26
"""Of a text file: five times the largest tokenizer.json of Qwen2's kind."""
MOST_LEVELS = 64
"""Lists and objects inside of each other."""
MOST_DIGITS = 32
"""Of a whole number: tokenizers say 10^30 for "no longest input"."""


@contextmanager
def reading(place: Path | str) -> Iterator[None]:
    """Whatever goes wrong inside is said of `place`: the one end of every damage that nothing foresaw.

    Raises:
        NvilaError: as it was raised, with the place before its own where it does not name it.
        DataError: anything else but a lack of memory.
    """
    try:
        yield
    except NvilaError as error:
        if str(place) in str(error):
            raise
        where = str(place) if error.where is None else f"{place}: {error.where}"
        raise type(error)(error.what, where=where, value=error.value, do=error.do, details=error.details) from error
    except MemoryError:
        raise
    except OSError as error:
        says = error.strerror or str(error)
        raise DataError("cannot be read", where=str(error.filename or place), value=says) from error
    except BaseException as error:
        # A panic of the tokenizers library is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError("damaged", where=str(place), value=f"{type(error).__name__}: {error}") from error


def require_regular(path: Path) -> int:
    """Bytes of a regular file: a pipe would be waited for, and a device read without end.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none, nor a link.
        DataError: another kind of thing, a link that leads nowhere, or it may not be read.
    """
    try:
        state = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise DataError("a link that leads nowhere", where=str(path)) from None
        raise
    except OSError as error:
        raise DataError("cannot be read", where=str(path), value=error.strerror) from None
    if not stat.S_ISREG(state.st_mode):
        raise DataError("not a regular file", where=str(path), do="Put the file itself there")
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise DataError("cannot be read", where=str(path), value="Permission denied")
    return state.st_size


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """A text in UTF-8.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        DataError: not a regular file, one of more than `most` bytes, or no UTF-8.
    """
    if (size := require_regular(path)) > most:
        raise DataError(
            f"larger than {most:,} bytes", where=str(path), value=size, do="This is not the file it should be"
        )
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError("not in UTF-8", where=str(path), value=str(error)) from None
    if "\0" in text:
        raise DataError("holds NUL characters", where=str(path), do="The file is damaged: fetch it again")
    return text


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of finite numbers, in which no key is there twice and nothing lies deeper than `MOST_LEVELS`.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        DataError: it is anything else.
    """
    text = read_text(path)
    try:
        content = parse(text)
    except (ValueError, RecursionError) as error:
        raise DataError("not readable JSON", where=str(path), value=str(error)) from None
    if not isinstance(content, dict):
        raise DataError("not a JSON object", where=str(path))
    return content


def parse(text: str | bytes) -> Any:
    """Strict JSON, as of `read_object`, of any kind.

    Raises:
        ValueError, RecursionError: it is not.
    """
    content = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite, parse_int=_short)
    level = [content]
    for _ in range(MOST_LEVELS):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, dict | list)]
        if not level:
            return content
    raise ValueError(f"more than {MOST_LEVELS} levels deep")


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is not finite")
    return number


def _short(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)
