"""Which model a person means on the command line: a folder, or an alias of the registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.manifest import Manifest, digest_json
from nvila.components.contracts.places import is_address

QUANTIZE = "quantize"
"""The step whose output is served."""


@dataclass(frozen=True)
class Model:
    """A checkpoint on this machine."""

    folder: Path
    name: str
    """What requests call it."""
    version: str
    """Number in the registry; 0 for a folder."""
    digest: str
    """Of the manifest it was registered with; for a folder, of the names and sizes of its files."""

    @property
    def native(self) -> bool:
        """In the three-folder layout (`llm`, `vision_tower`, `mm_projector`), which vLLM does not read."""
        return (self.folder / "llm").is_dir()


def find_model(reference: str, runs: Path) -> Model:
    """The model in a folder, or the registered one with this alias or number (of the latest model, or `NAME@ALIAS`).

    Raises:
        ConfigError: neither.
    """
    if is_address(reference):
        do = f"Write it into a folder first: nvila convert {reference} FOLDER --to LAYOUT"
        raise ConfigError("neither a folder here nor a registered model", value=reference, do=do)
    folder = Path(reference)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError("no checkpoint: config.json is missing", where=reference)
        files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
        return Model(folder.absolute(), folder.absolute().name, "0", digest_json(files))
    return _registered(reference, runs)


def _registered(reference: str, runs: Path) -> Model:
    do = "Give the folder of a checkpoint, or run a recipe first."
    if not (runs / "mlflow.db").is_file():
        raise ConfigError(f"no such folder, and {runs} has no registry", value=reference, do=do)
    from nvila.components.tracking.registry import find, models, registered_inputs

    name, _, alias = reference.rpartition("@")
    for candidate in [name] if name else models(runs):
        if version := find(runs, candidate, alias):
            made = next((ref for ref in registered_inputs(version) if ref.step == QUANTIZE), None)
            if made is None:
                raise ConfigError("this version was not registered by a run", where=version.uri)
            manifest = Manifest.load(made.uri)
            manifest = manifest.model_copy(update={"folder": str(Path(made.uri).parent)})
            return Model(manifest.dir("model"), version.name, version.version, made.digest)
    raise ConfigError(f"no registered model has the alias or number {alias!r}", where=str(runs / "mlflow.db"), do=do)
