"""Reads an annotation file of any layout into records, which look as LLaVA's do; what they say is judged elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.data import Layout


def read(path: Path, layout: Layout) -> list[Any]:
    """The records of a file, in its order.

    Raises:
        DataError: the file is not what its layout says; names file and line.
    """
    try:
        return READERS[layout](path)
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8", where=str(path), value=f"byte {error.start}") from None


def _llava(path: Path) -> list[Any]:
    """A JSON list of `{id, image or video, conversations}`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON: {error.msg}", where=f"{path}:{error.lineno}:{error.colno}") from None
    except RecursionError:
        raise DataError("JSON nested too deeply", where=str(path)) from None
    if not isinstance(content, list):
        raise DataError("must hold a JSON list of records", where=str(path), value=type(content).__name__)
    return content


READERS: dict[Layout, Callable[[Path], list[Any]]] = {"llava": _llava}
"""Of each layout; the suffix of its files stands in `contracts/recipe/data.py`."""
