"""Which model a name means: a place on this machine, or a version of the registry. Every command asks here."""

from __future__ import annotations

from pathlib import Path

from nvila.components.contracts.errors import ConfigError
from nvila.components.tracking.connect import has_store, hurry, tracking_uri
from nvila.components.tracking.redact import redact_text
from nvila.components.tracking.registry import Version, find, models, registered_inputs

FORMS = "a path, s3://bucket/prefix, hf://id@revision, NAME@ALIAS, NAME/NUMBER, or an alias of the newest model"


def named(reference: str, runs: Path) -> Path | Version:
    """The folder or file at this path; else the version `NAME@ALIAS` or `NAME/NUMBER` of the registry, or the one with
    this alias or number of the registered model that was changed last among those that have it.

    Raises:
        ConfigError: neither, or a version that no run of ours registered.
        DamagedError: the version's tags were edited.
        Unreachable: MLflow does not answer.
    """
    if reference and (path := Path(reference)).exists():
        return path
    return registered(reference, runs)


def registered(reference: str, runs: Path) -> Version:
    """The version of the registry with this name, as of `named`, whatever lies at a path like it."""
    name, given, key = reference.rpartition("@" if "@" in reference else "/")
    known = []
    if has_store(runs):
        hurry()
        known = models(runs)
    for model in [name] if given else known:
        version = find(runs, model, key) if model in known else None
        if version is not None:
            if not registered_inputs(version):
                raise ConfigError("this version was not registered by a run", where=version.uri)
            return version
    folder = f" The folder is ./{reference}." if reference and Path(reference).exists() else ""
    raise ConfigError(
        f"{'' if folder else 'nothing here and '}no version of the registry has this name",
        where=redact_text(tracking_uri(runs)) if has_store(runs) else f"{runs} has no registry",
        value=reference,
        do=f"Registered models: {', '.join(known) or 'none'}. Give {FORMS}.{folder}",
    )
