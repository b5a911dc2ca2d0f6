"""Which model a name means: a place on this machine, or a version of the registry. Every command asks here."""

from __future__ import annotations

from pathlib import Path

from nvila.components.contracts.errors import ConfigError
from nvila.components.tracking.connect import has_store, is_shared, tracking_uri
from nvila.components.tracking.redact import redact_text
from nvila.components.tracking.registry import Version, find, find_all, models, registered_inputs
from nvila.components.tracking.runs import registered_here

FORMS = "a path, s3://bucket/prefix, hf://id@revision, NAME@ALIAS, NAME/NUMBER, or an alias of your newest model"


def named(reference: str, runs: Path) -> Path | Version:
    """The folder or file at this path; else the version `NAME@ALIAS` or `NAME/NUMBER` of the registry, or the one with
    this alias or number that a run registered: the only one, or of several yours (`_mine`).

    Raises:
        ConfigError: neither, a version that no run registered, or several that may be other teams'.
        DamagedError: the version's tags were edited.
        Unreachable: MLflow does not answer.
    """
    if reference and (path := Path(reference)).exists():
        return path
    return registered(reference, runs)


def registered(reference: str, runs: Path) -> Version:
    """The version of the registry with this name, as of `named`, whatever lies at a path like it."""
    name, given, key = reference.rpartition("@" if "@" in reference else "/")
    found: list[Version] = []
    if has_store(runs):
        found = list(filter(None, [find(runs, name, key)])) if given else find_all(runs, key)
    found = [version for version in found if version.by_a_run] or found[:1]
    if found:
        version = found[0] if len(found) == 1 else _mine(found, key, runs)
        if not registered_inputs(version):
            raise ConfigError("this version was not registered by a run", where=version.uri)
        return version
    folder = f" The folder is ./{reference}." if reference and Path(reference).exists() else ""
    known = models(runs) if has_store(runs) else []
    raise ConfigError(
        f"{'' if folder else 'nothing here and '}no version of the registry has this name",
        where=redact_text(tracking_uri(runs)) if has_store(runs) else f"{runs} has no registry",
        value=reference,
        do=f"Registered models: {_listed(known)}. Give {FORMS}.{folder}",
    )


def _mine(found: list[Version], key: str, runs: Path) -> Version:
    """Of several models the newest that a run of this folder registered: a shared registry holds other teams' models.

    Raises:
        ConfigError: none was, so nobody knows which is meant.
    """
    ours = registered_here(runs, [version.run_id for version in found]) if is_shared() else None
    for version in found:
        if ours is None or version.run_id in ours:
            return version
    names = [f"{version.name}{'/' if key.isdecimal() else '@'}{key}" for version in found]
    raise ConfigError(
        f"several registered models have this, and no run of {runs} registered one of them",
        where=redact_text(tracking_uri(runs)),
        value=key,
        do=f"Say which: {_listed(names)}.",
    )


def _listed(names: list[str], most: int = 10) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more
