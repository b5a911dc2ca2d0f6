"""The far end of the lineage: whether the user's pictures and clips still are those that `validate` read."""

from __future__ import annotations

from pathlib import Path

from nvila.components.contracts.digests import is_sha256, medium_sha256
from nvila.components.contracts.manifest import Manifest

TABLE = "samples.parquet"
"""A manifest that names it is of `validate`: the table has columns `root`, `media` and `media_sha256`."""


def changed_media(manifest: Manifest) -> tuple[int, list[str]]:
    """How many media files of the manifest's samples were read, and the paths of those that are gone or changed.

    The caller has checked the manifest's own files.
    """
    if TABLE not in manifest.files:
        return 0, []
    import pyarrow.parquet as parquet

    table = parquet.read_table(Path(manifest.folder, manifest.files[TABLE].uri))
    if not {"root", "media", "media_sha256"} <= set(table.column_names):
        return 0, []
    recorded = {
        Path(row["root"], name): sha256
        for row in table.select(["root", "media", "media_sha256"]).to_pylist()
        for name, sha256 in zip(row["media"] or (), row["media_sha256"] or (), strict=False)
        if is_sha256(sha256)
    }
    return len(recorded), [str(path) for path, sha256 in recorded.items() if _digest(path) != sha256]


def _digest(path: Path) -> str | None:
    try:
        return medium_sha256(path, fresh=True)
    except OSError:
        return None
