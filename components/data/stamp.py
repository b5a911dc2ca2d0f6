"""The file that says what a demonstration source was built with, and whether the folder is still what was built.

`make clean` reads it without any installed package.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

STAMP = "SOURCE.json"
"""File in a source's folder that says which builder made it, with which parameters, and what is spoilt in it."""


def read_stamp(folder: Path) -> dict[str, Any]:
    """The stamp's content; empty where there is none of ours."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return stamp if isinstance(stamp["parameters"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def content_digest(folder: Path) -> str:
    """Digest of names and bytes of everything in `folder` but the stamp; a link counts as one, not as its target."""
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            lines.append(f"other {name}")
        elif path.is_dir():
            lines.append(f"folder {name}")
        elif name != STAMP:
            lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()} {name}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def as_built(folder: Path) -> bool:
    """Whether `folder` holds a demonstration source and nothing else: nothing of it was added, changed or removed."""
    built = read_stamp(folder).get("content")
    return built is not None and built == content_digest(folder)
