"""Manifests and source files as MLflow dataset inputs, so that the UI shows which data a step read."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nvila.components.contracts.manifest import MANIFEST, File, Manifest, digest_json
from nvila.components.tracking.columns import DATASET_DIGEST, DATASET_NAME, fitted
from nvila.components.tracking.redact import redact_text

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput


def dataset_inputs(inputs: Mapping[str, Manifest], manifest: Manifest | None) -> list[DatasetInput]:
    """Input manifests that are data, and the user's files that the step itself read (one dataset per folder)."""
    found = [
        _dataset(m.step, m.digest, f"{m.folder}/{MANIFEST}", {"files": len(m.files)}, name)
        for name, m in inputs.items()
        if m.kind == "dataset"
    ]
    folders: dict[str, list[File]] = defaultdict(list)
    for file in manifest.sources if manifest else []:
        folders[str(PurePosixPath(file.uri).parent)].append(file)
    for folder, files in sorted(folders.items()):
        digest = digest_json(sorted((file.uri, file.sha256) for file in files))
        profile = {"files": len(files), "bytes": sum(file.size_bytes for file in files)}
        found.append(_dataset(PurePosixPath(folder).name or "/", digest, folder, profile, "source"))
    return found


def _dataset(name: str, digest: str, place: str, profile: dict[str, Any], context: str) -> DatasetInput:
    """The whole digest is in the profile."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=fitted(name, DATASET_NAME),
        digest=digest[:DATASET_DIGEST],
        source_type=urlsplit(place).scheme or "local",
        source=json.dumps({"uri": redact_text(place)}),
        profile=json.dumps(profile | {"sha256": digest}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
