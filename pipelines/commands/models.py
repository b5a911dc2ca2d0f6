"""Which model a person means on the command line: a folder, or an alias of the registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nvila.components.contracts.digests import sha256_of
from nvila.components.contracts.errors import ConfigError, DamagedError
from nvila.components.contracts.manifest import MANIFEST, Manifest, digest_json, written_by
from nvila.components.contracts.places import is_address
from nvila.components.contracts.steps import QUANTIZE
from nvila.components.tracking.connect import has_store, tracking_uri
from nvila.components.tracking.redact import redact_text


@dataclass(frozen=True)
class Model:
    """A checkpoint on this machine."""

    folder: Path
    name: str
    """What requests call it."""
    version: str
    """Number in the registry; 0 for a folder."""
    digest: str
    """Of the step's manifest; for a folder that no step wrote, of the names and digests of its files."""

    @property
    def native(self) -> bool:
        """In the three-folder layout (`llm`, `vision_tower`, `mm_projector`), which vLLM does not read."""
        return (self.folder / "llm").is_dir()


def find_model(reference: str, runs: Path) -> Model:
    """The model in a folder, or the registered one with this alias or number (of the latest model, or `NAME@ALIAS`).

    Its files are read and are those that the step wrote; a folder from elsewhere has nothing to be held against.

    Raises:
        ConfigError: neither.
        DamagedError: files or manifest are not what the step wrote, or not what was registered.
    """
    if is_address(reference):
        do = f"Write it into a folder first: nvila convert {reference} FOLDER --to LAYOUT"
        raise ConfigError("neither a folder here nor a registered model", value=reference, do=do)
    folder = Path(reference)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError("no checkpoint: config.json is missing", where=reference)
        made = written_by(folder)
        return Model(folder.absolute(), folder.absolute().name, "0", made.digest if made else _digest(folder))
    return _registered(reference, runs)


def _registered(reference: str, runs: Path) -> Model:
    do = "Give the folder of a checkpoint, or run a recipe first."
    if not has_store(runs):
        raise ConfigError(f"no such folder, and {runs} has no registry", value=reference, do=do)
    from nvila.components.tracking.registry import find, models, registered_inputs

    name, _, alias = reference.rpartition("@")
    for candidate in [name] if name else models(runs):
        if version := find(runs, candidate, alias):
            made = next((ref for ref in registered_inputs(version) if ref.step == QUANTIZE), None)
            if made is None:
                raise ConfigError("this version was not registered by a run", where=version.uri)
            manifest = Manifest.load(made.uri)
            if manifest.digest != made.digest:
                raise DamagedError(
                    f"this is not the model that was registered as {version.uri}",
                    where=str(Path(manifest.folder, MANIFEST)),
                    value={"registry": made.digest[:12], "there": manifest.digest[:12]},
                    do="Run the recipe again to make and register it, or give the folder of a checkpoint.",
                )
            return Model(manifest.dir("model", fresh=True), version.name, version.version, made.digest)
    raise ConfigError(
        f"no registered model has the alias or number {alias!r}", where=redact_text(tracking_uri(runs)), do=do
    )


def _digest(folder: Path) -> str:
    paths = sha256_of(path for path in sorted(folder.rglob("*")) if path.is_file())
    return digest_json({path.relative_to(folder).as_posix(): sha256 for path, sha256 in paths.items()})
