"""Holds a step's inputs against what MLflow recorded when they were made: who edits only the store is found out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.components.contracts.errors import Rejected
from nvila.components.contracts.manifest import MANIFEST, Manifest
from nvila.components.contracts.text import say
from nvila.components.tracking.connect import connected, has_store, pages
from nvila.components.tracking.redact import redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def compare(runs: Path, step: str, inputs: Mapping[str, Manifest]) -> None:
    """Pass where MLflow has a run of each input's step and key with the manifest's digest.

    Where it has none at all (it was away then, or is now), that is said in one line: the store alone is believed.

    Raises:
        Rejected: MLflow recorded other results for the same work, and never these.
    """
    try:
        digests = {name: _digests(runs, manifest) for name, manifest in inputs.items()}
    except Exception as problem:
        say(redact_text(f"{step}: inputs not compared with MLflow: {type(problem).__name__}: {problem}"))
        return
    if unknown := sorted(inputs[name].step for name, known in digests.items() if not known):
        say(f"{step}: MLflow has no record of {', '.join(unknown)}; the store alone is believed")
    for name, known in digests.items():
        manifest = inputs[name]
        if known and manifest.digest not in known:
            raise Rejected(
                f"the manifest of step {manifest.step} is not the one that MLflow recorded when the step ran",
                where=str(Path(manifest.folder, MANIFEST)),
                value={"MLflow": sorted(digest[:12] for digest in known), "store": manifest.digest[:12]},
                do=f"Somebody edited one of them. Remove {manifest.folder} and run again: the step is then repeated.",
            )


def _digests(runs: Path, manifest: Manifest) -> set[str]:
    """What every recorded run of this very work made."""
    if not has_store(runs):
        return set()
    with connected(runs) as client:
        return {run.data.tags["nvila.digest"] for run in _runs(client, manifest) if "nvila.digest" in run.data.tags}


def _runs(client: MlflowClient, manifest: Manifest) -> list[Run]:
    experiments = [each.experiment_id for each in pages(client.search_experiments)]
    same = f"tags.`nvila.step` = '{manifest.step}' and tags.`nvila.key` = '{manifest.key}'"
    return list(pages(client.search_runs, experiments, same))
