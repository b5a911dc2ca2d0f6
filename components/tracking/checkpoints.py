"""The model that a name on the command line or in a recipe means, as a checkpoint on this machine that was found to be
that model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nvila.components.contracts.digests import sha256_of
from nvila.components.contracts.errors import ConfigError, DamagedError, DataError
from nvila.components.contracts.manifest import MANIFEST, InputRef, Manifest, digest_json, written_by
from nvila.components.contracts.places import is_address, is_version
from nvila.components.data import fetch as weights
from nvila.components.data.remote.cache import alone, cache
from nvila.components.tracking.named import named, registered
from nvila.components.tracking.registry import DIGEST_TAG, Version, download, registered_inputs


@dataclass(frozen=True)
class Model:
    """A checkpoint on this machine."""

    folder: Path
    name: str
    """What requests call it."""
    version: str = "0"
    """Number in the registry; 0 for any other checkpoint."""
    made: Manifest | None = None
    """Of the step that wrote it; None for a checkpoint from elsewhere."""

    @cached_property
    def digest(self) -> str:
        """Of the step's manifest; of a checkpoint that no step wrote, of the names and digests of its files."""
        if self.made is not None:
            return self.made.digest
        paths = sha256_of(path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return digest_json({path.relative_to(self.folder).as_posix(): sha256 for path, sha256 in paths.items()})


def find_model(reference: str, runs: Path) -> Model:
    """The checkpoint at a path (a folder, or the manifest of a step that wrote one), at `s3://bucket/prefix` or
    `hf://id@revision`, or of a version of the registry (`named`), whose files are brought here where they are not.

    What a step wrote is read, and is what it wrote; what was registered, too. A checkpoint from elsewhere has nothing
    to be held against.

    Raises:
        ConfigError: none of these.
        DataError: it cannot be brought here.
        DamagedError: files or manifest are not what the step wrote, or not what was registered.
        Unreachable: S3, the hub or MLflow does not answer.
    """
    if is_address(reference):
        return _at(weights.fetch(reference), reference.rstrip("/").rpartition("/")[2].partition("@")[0])
    try:
        found = named(reference, runs := runs.absolute())
        if isinstance(found, Path):
            return _at(found.absolute(), found.absolute().name)
    except PermissionError as error:
        raise DataError("cannot be read", where=str(error.filename or reference), value=error.strerror) from None
    return _registered(found, runs)


def identity(place: str | None, runs: Path) -> dict[str, str]:
    """What a recipe's weights are now, for a content key: of a version of the registry (`places.is_version`) the digest
    of the registered model, of any other place what `fetch.identity` says. Nothing is brought here.

    Raises:
        ConfigError, DamagedError, DataError, Unreachable: as `find_model`.
    """
    if place is None or not is_version(place):
        return weights.identity(place)
    return {"digest": made_of(registered(place, runs.absolute())).digest}


def fetch_version(place: str, runs: Path) -> tuple[Path, dict[str, str]]:
    """The checkpoint that a recipe's weights are, on this machine, and the `identity` of what was brought here.

    Raises:
        ConfigError, DamagedError, DataError, Unreachable: as `find_model`.
    """
    if not is_version(place):
        return weights.fetch_version(place)
    found = _registered(registered(place, runs := runs.absolute()), runs)
    return found.folder, {"digest": found.digest}


def _at(place: Path, name: str) -> Model:
    manifest = place / MANIFEST if place.is_dir() else place
    if manifest.is_file():
        made = Manifest.load(manifest)
        return Model(made.dir("model", fresh=True), name if place.is_dir() else place.parent.name, made=made)
    return Model(place, name, made=written_by(place))


def _registered(version: Version, runs: Path) -> Model:
    made = made_of(version)
    manifest = Manifest.load(made.uri) if os.path.lexists(made.uri) else _downloaded(version, made, runs)
    require(manifest, made, version)
    return Model(manifest.dir("model", fresh=True), version.name, version.version, manifest)


def made_of(version: Version) -> InputRef:
    """The manifest that the version was registered from."""
    made = next((ref for ref in registered_inputs(version) if ref.digest == version.tags.get(DIGEST_TAG)), None)
    if made is None:
        raise ConfigError("this version was not registered by a run", where=version.uri)
    return made


def _downloaded(version: Version, made: InputRef, runs: Path) -> Manifest:
    """The manifest in the cache, with the model's files beside it: those that are not there yet come from MLflow."""
    folder = cache() / "registry" / made.digest
    with alone(f"registry/{made.digest}", version.uri):
        if not (folder / MANIFEST).is_file():
            download(runs, version, MANIFEST, folder)
        manifest = Manifest.load(folder / MANIFEST)
        require(manifest, made, version)
        files = [name for name in manifest.files if name.startswith("model/")]
        for name in manifest.faults(files, deep=True, fresh=False):
            download(runs, version, name, folder)
    return manifest


def require(manifest: Manifest, made: InputRef, version: Version) -> None:
    """Raises:
    DamagedError: the manifest is not that of the registered model.
    """
    if manifest.digest != made.digest:
        raise DamagedError(
            f"this is not the model that was registered as {version.uri}",
            where=str(Path(manifest.folder, MANIFEST)),
            value={"registry": made.digest[:12], "there": manifest.digest[:12]},
            do="Run the recipe again to make and register it, or give the folder of a checkpoint.",
        )
