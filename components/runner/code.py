"""The digest of our steps' code: a compiled pipeline carries it, and a step refuses to run as other code."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from nvila.components.contracts.keys import file_digest
from nvila.components.contracts.manifest import digest_json


def code_digest() -> str:
    """First 16 hex characters of the digest over every Python file of the package `components`, remarks left out."""
    spec = find_spec("nvila.components")
    assert spec and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    return digest_json({path.relative_to(root).as_posix(): file_digest(str(path)) for path in root.rglob("*.py")})[:16]
