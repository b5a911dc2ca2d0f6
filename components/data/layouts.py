"""Reads an annotation file of any layout into records, which look as LLaVA's do; what they say is judged elsewhere."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nvila.components.contracts import jsonlines
from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.data import Layout

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks, as Windows tools write them; without one a text is UTF-8."""
KEYS = {"id", "image", "video", "images", "videos", "conversations", "messages", "labels"}
"""A JSON object with none of them is no record: the records may lie deeper in it."""
DIGITS = 300
"""A whole number of more digits is as good as infinite."""


@dataclass(frozen=True)
class Broken:
    """In the place of a record that cannot be read, where the others can."""

    why: str


def read(path: Path, layout: Layout) -> list[Any]:
    """The records of a file, in its order; a line of JSON lines that is none is `Broken`.

    Raises:
        DataError: the file is not what its layout says; names file and line.
    """
    return READERS[layout](path)


def read_text(path: Path) -> str:
    """A text file as the mark at its beginning says, else UTF-8; without the mark.

    Raises:
        DataError: it is no such text, or cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None
    mark, encoding = next((pair for pair in MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = f"byte {len(mark) + error.start}"
        raise DataError(f"not {encoding.upper()}", where=str(path), value=at, do="Save it as UTF-8.") from None


def _llava(path: Path) -> list[Any]:
    """A JSON list of `{id, image or video, conversations}`, or one such object a line, whatever the file's name."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return _lines(path, text)
    try:
        content = _load(text)
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON: {error.msg}", where=f"{path}:{error.lineno}:{error.colno}") from None
    except RecursionError:
        raise DataError("JSON nested too deeply", where=str(path)) from None
    return list(content)


def _lines(path: Path, text: str) -> list[Any]:
    """JSON lines. What is no line of them at all is no annotation file."""
    records = [_line(line) for line in jsonlines.split(text)]
    if records and not any(isinstance(record, dict) and KEYS & record.keys() for record in records):
        raise DataError("must hold a JSON list of records, or one JSON record a line", where=str(path))
    return records


def _line(line: str) -> Any:
    try:
        return _load(line)
    except json.JSONDecodeError as error:
        return Broken(f"no JSON: {error.msg} at character {error.colno}")
    except RecursionError:
        return Broken("JSON nested too deeply")


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= DIGITS else float(digits)


_load = partial(json.loads, parse_int=_whole_number)

READERS: dict[Layout, Callable[[Path], list[Any]]] = {"llava": _llava}
"""Of each layout; the suffixes of its files stand in `contracts/recipe/data.py`."""
