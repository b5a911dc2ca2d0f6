"""The model that training goes on from: of a version of the registry, which is quantized, the one that it was made
from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.manifest import MANIFEST, InputRef, Manifest, written_by
from nvila.components.contracts.places import is_version
from nvila.components.contracts.results.model import Quantization
from nvila.components.data import fetch as weights
from nvila.components.tracking.checkpoints import made_of, require
from nvila.components.tracking.named import registered
from nvila.components.tracking.registry import Version


@dataclass(frozen=True)
class Trained:
    """A checkpoint on this machine, whose bytes are those that were written where a manifest says so."""

    folder: Path
    version: dict[str, str]
    """Its `identity`."""
    made: Manifest | None
    """Of the step that wrote it; None for one from elsewhere."""

    @property
    def ref(self) -> InputRef | None:
        """The manifest as lineage names it."""
        if self.made is None:
            return None
        return InputRef(step=self.made.step, uri=str(Path(self.made.folder, MANIFEST)), digest=self.made.digest)


def identity(place: str, runs: Path) -> dict[str, str]:
    """What the place holds now, for a content key: of a version of the registry its number and the digest of the model
    that it was quantized from, of any other place what `fetch.identity` says. Nothing is brought here.

    Raises:
        ConfigError, DamagedError, DataError, Unreachable: as `find`.
    """
    if not is_version(place):
        return weights.identity(place)
    version = registered(place, runs.absolute())
    return _identity(version, _trained(version))


def folder_of(place: str, runs: Path) -> Path:
    """Folder of what describes the checkpoint: the files are not read, weights from elsewhere not fetched.

    Raises:
        ConfigError, DamagedError, DataError, Unreachable: as `find`.
    """
    if is_version(place):
        return Path(_trained(registered(place, runs.absolute())).folder, "model")
    return weights.fetch_description(place)


def find(place: str, runs: Path) -> Trained:
    """The checkpoint of a recipe's `model.base.model`: at a path, `s3://`, `hf://id@revision`, or of a version.

    Raises:
        ConfigError: no such version, or its run's files do not lie here.
        DataError: nothing there, or it cannot be brought here.
        DamagedError: files or manifests are not what was written.
        Unreachable: S3, the hub or MLflow does not answer.
    """
    if is_version(place):
        version = registered(place, runs.absolute())
        made = _trained(version)
        return Trained(made.dir("model", fresh=True), _identity(version, made), made)
    folder, fetched = weights.fetch_version(place)
    inner = folder / "model"
    whole = inner if (folder / MANIFEST).is_file() and inner.is_dir() else folder
    return Trained(whole, fetched, written_by(whole))


def _identity(version: Version, made: Manifest) -> dict[str, str]:
    return {"version": version.uri, "digest": made.digest}


def _trained(version: Version) -> Manifest:
    """Of the model before its quantization, in the store of its run: the registry keeps the quantized one alone."""
    made, do = made_of(version), "Run this where that store lies, or give the folder of a checkpoint."
    if not os.path.lexists(made.uri):
        raise ConfigError(
            "a registered model is quantized, and the store with the one that it was made from is not here",
            where=version.uri,
            value=made.uri,
            do=do,
        )
    manifest = Manifest.load(made.uri)
    require(manifest, made, version)
    while isinstance(manifest.result, Quantization):
        try:
            manifest = manifest.origin("model")
        except DataError as error:
            ref = manifest.inputs["model"]
            raise ConfigError(
                f"the model that {version.uri} was quantized from cannot be read: {error.what}",
                where=ref.uri,
                do=do,
            ) from error
    return manifest
