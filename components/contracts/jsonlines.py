"""JSON lines, ours and other people's: one value a line, and a line ends at a line feed alone.

JSON allows U+2028, U+2029, U+0085 and their like unescaped in a text; `str.splitlines` would cut a record there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def split(text: str) -> Iterator[str]:
    """The lines that hold something."""
    return (line for line in text.split("\n") if line.strip())


def parse(text: str) -> list[Any]:
    """The values of all lines.

    Raises:
        ValueError: a line is no JSON.
    """
    return [json.loads(line) for line in split(text)]


def whole(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file; a line that a crash has cut off, or that is no object, is passed over, as is no file."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in split(text):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            yield content


def dump(records: Iterable[Any]) -> str:
    """The text of a file that holds `records`."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
