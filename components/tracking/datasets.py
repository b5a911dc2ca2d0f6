"""Manifests and source files as MLflow dataset inputs, so that the UI shows which data a step read."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.manifest import File, Manifest, digest_json
from nvila.components.tracking.redact import redact_text

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

DIGEST_CHARS = 36
"""Longest digest MLflow keeps; the whole one is in the dataset's profile."""


def dataset_inputs(inputs: Mapping[str, Manifest], manifest: Manifest | None) -> list[DatasetInput]:
    """Input manifests that are data, and the user's files that the step itself read (one dataset per folder)."""
    found = [
        _dataset(m.step, m.digest, {"manifest": f"{m.folder}/manifest.json"}, {"files": len(m.files)}, name)
        for name, m in inputs.items()
        if m.kind == "dataset"
    ]
    folders: dict[str, list[File]] = defaultdict(list)
    for file in manifest.sources if manifest else []:
        folders[str(PurePosixPath(file.uri).parent)].append(file)
    for folder, files in sorted(folders.items()):
        digest = digest_json(sorted((file.uri, file.sha256) for file in files))
        profile = {"files": len(files), "bytes": sum(file.size_bytes for file in files)}
        found.append(
            _dataset(PurePosixPath(folder).name or "/", digest, {"uri": redact_text(folder)}, profile, "source")
        )
    return found


def _dataset(name: str, digest: str, source: Any, profile: dict[str, Any], context: str) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=name[:500],
        digest=digest[:DIGEST_CHARS],
        source_type="local",
        source=json.dumps(source),
        profile=json.dumps(profile | {"sha256": digest}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
