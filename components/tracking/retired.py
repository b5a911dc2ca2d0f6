"""Versions of the registry that runs registered: all of them with when they changed, and the end of one.

Its logged model is deleted with it, as MLflow deletes: `mlflow gc` on the server frees the bytes.
"""

from __future__ import annotations

from pathlib import Path

from nvila.components.tracking.connect import connected, has_store, is_shared, pages
from nvila.components.tracking.registry import LOGGED_MODEL_TAG, Version, find
from nvila.components.tracking.runs import registered_here


def registered_versions(runs: Path) -> list[tuple[Version, float]]:
    """Every version of the registry that a run registered, with its aliases, and the second since the epoch in which it
    changed last.

    Raises:
        Unreachable, ConfigError: as `connected`.
    """
    if not has_store(runs):
        return []
    with connected(runs) as client:
        aliases = {
            (model.name, str(number)): alias
            for model in pages(client.search_registered_models, max_results=100)
            for alias, number in model.aliases.items()
        }
        found = []
        for made in pages(client.search_model_versions, max_results=100):
            named = tuple(filter(None, [aliases.get((made.name, str(made.version)))]))
            version = Version(made.name, str(made.version), dict(made.tags), named, made.run_id or "")
            changed = made.last_updated_timestamp or made.creation_timestamp
            if version.by_a_run:
                found.append((version, changed / 1000))
    return sorted(found, key=lambda each: (each[0].name, int(each[0].version)))


def ours(runs: Path, versions: list[Version]) -> list[Version]:
    """Those that a run of this folder registered: a shared registry holds other teams' too."""
    if not (is_shared() and versions):
        return versions
    here = registered_here(runs, [version.run_id for version in versions])
    return [version for version in versions if version.run_id in here]


def retire(runs: Path, version: Version) -> bool:
    """Delete a version; not where an alias names it now, which is asked for just before, as MLflow deletes without
    conditions. Whether it is gone.

    Raises:
        Unreachable, ConfigError: as `connected`.
    """
    now = find(runs, version.name, version.version)
    if now is None:
        return True
    if now.aliases:
        return False
    with connected(runs) as client:
        client.delete_model_version(version.name, version.version)
        if logged := version.tags.get(LOGGED_MODEL_TAG):
            client.delete_logged_model(logged)
    return True
