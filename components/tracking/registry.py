"""The MLflow model registry as a reconciler: one version per model digest, and the aliases that rollout moves.

`register` and `rollout` decide; this only makes the registry say so, and saying it twice changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nvila.components.contracts.addresses import below
from nvila.components.contracts.digests import sha256_file
from nvila.components.contracts.errors import ConfigError, DamagedError, DataError, NvilaError, Unreachable
from nvila.components.contracts.manifest import InputRef, Manifest
from nvila.components.contracts.store import MANIFEST
from nvila.components.tracking.columns import DESCRIPTION, TAG, fitted
from nvila.components.tracking.connect import answered, connected, pages, uploading
from nvila.components.tracking.redact import redact, redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

CHALLENGER: Final = "challenger"
CHAMPION: Final = "champion"
PREVIOUS: Final = "previous"
DIGEST_TAG = "nvila.digest"
"""Tag of a version: digest of the model's manifest. Two versions never share it."""
INPUT_TAG = "nvila.input."
"""Prefix of a version's tags that hold its lineage: an `InputRef` as JSON for each manifest it was registered from."""
DECISION_TAG = "nvila.rollout"
"""Tag of a version: what the last rollout decided of it, and why."""
LOGGED_MODEL_TAG = "nvila.logged_model"
"""Tag of a version: the id of its logged model, which MLflow's SQL registry does not keep."""
PINNED_TAG: Final = "nvila.pinned"
"""Tag of a version: SHA-256 of its file of pinned prompts."""
APPROVED_TAG: Final = "nvila.approved-by"
"""Tag of a version, which people set: who lets users' requests reach it."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    version: str
    tags: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    run_id: str = ""
    """The run in MLflow that registered it."""

    @property
    def by_a_run(self) -> bool:
        """Whether a run of this platform registered it, ours or another team's."""
        return any(key.startswith(INPUT_TAG) for key in self.tags)

    @property
    def uri(self) -> str:
        """What MLflow's APIs take."""
        return f"models:/{self.name}/{self.version}"


LogModel = Callable[["MlflowClient"], Mapping[str, Any]]
"""Uploads the model and returns `source`, `run_id` and `model_id` for the new version."""


def register_version(
    runs: Path,
    name: str,
    digest: str,
    log_model: LogModel,
    *,
    description: str,
    tags: Mapping[str, str],
) -> Version:
    """The version of model `name` that holds the model with this digest, made when missing, with this card and tags.

    Of several runs at once, on this machine or on others, all get the same version of the same model.

    Args:
        runs: the runs folder, which holds the local registry.
        digest: of the model's manifest; identifies the version.
        log_model: called only when there is no such version yet.
        description: the model card, Markdown.
        tags: lineage and the like; secrets are redacted.
    """
    with connected(runs) as client:
        found = _with_digest(client, name, digest)
        if found is None:
            _ensure_model(client, name)
            logged = dict(log_model(client))
            own = {DIGEST_TAG: digest, LOGGED_MODEL_TAG: logged["model_id"]}
            found = _first(client, _version(client.create_model_version(name, tags=own, **logged)), digest)
            link = json.dumps([{"name": name, "version": int(found.version)}])  # the other direction, for the UI
            client.set_logged_model_tags(logged["model_id"], {"mlflow.modelVersions": link})
        client.update_model_version(name, found.version, fitted(redact_text(description), DESCRIPTION))
        for key, value in redact({**tags, DIGEST_TAG: digest}).items():
            if found.tags.get(key) != value:
                client.set_model_version_tag(name, found.version, key, value)
        return _version(client.get_model_version(name, found.version))


def lineage_tags(inputs: Mapping[str, Manifest]) -> dict[str, str]:
    """Tags for `register_version` that say which manifests a version comes from."""
    refs = {n: InputRef(step=m.step, uri=f"{m.folder}/{MANIFEST}", digest=m.digest) for n, m in inputs.items()}
    return {INPUT_TAG + name: ref.model_dump_json() for name, ref in refs.items()}


def registered_inputs(version: Version) -> list[InputRef]:
    """What `lineage_tags` wrote; empty for a version that no run of ours registered.

    Raises:
        DamagedError: somebody edited the tags: one is no `InputRef`, or they speak of two models.
    """
    texts = {key.removeprefix(INPUT_TAG): text for key, text in version.tags.items() if key.startswith(INPUT_TAG)}
    try:
        refs = {name: InputRef.model_validate_json(text) for name, text in texts.items()}
        if "model" in refs and refs["model"].digest != version.tags.get(DIGEST_TAG):
            raise ValueError(f"{DIGEST_TAG} and {INPUT_TAG}model name different models")
    except ValueError as error:
        raise DamagedError(
            f"the version's tags were edited: {str(error).splitlines()[0]}",
            where=version.uri,
            do="Run the recipe again, which registers the model, or name a folder.",
        ) from error
    return list(refs.values())


def keep_pinned(runs: Path, version: Version, file: Path) -> None:
    """Have the version's logged model hold this file of pinned prompts, and its tag the SHA-256.

    The tag comes last: where this is cut in between, it names another file, and nobody believes either.

    Raises:
        NvilaError: the place of artifacts does not take it.
        Unreachable: MLflow does not answer.
    """
    sha256 = sha256_file(file)
    if version.tags.get(PINNED_TAG) == sha256:
        return
    with connected(runs) as client:
        with uploading("the pinned prompts", version.uri, "Nothing is lost: the same command goes on from here."):
            client.log_model_artifact(version.tags[LOGGED_MODEL_TAG], str(file))
        client.set_model_version_tag(version.name, version.version, PINNED_TAG, sha256)


def challenge(runs: Path, name: str, version: str) -> None:
    """Ask for a version: who rolls the model out tries the one that `challenger` names."""
    with connected(runs) as client:
        _point(client, name, CHALLENGER, version)


def withdraw(runs: Path, name: str, version: str) -> bool:
    """Ask for it no more, unless somebody has asked for another one since. Returns whether it was asked for."""
    with connected(runs) as client:
        asked = _find(client, name, CHALLENGER)
        if ours := asked is not None and asked.version == version:
            client.delete_registered_model_alias(name, CHALLENGER)
        return ours


def promote(runs: Path, name: str, version: str) -> str | None:
    """Make `version` the champion; the old champion becomes `previous`. Returns the old one's number, if it differs."""
    with connected(runs) as client:
        old = _find(client, name, CHAMPION)
        if old and old.version != version:
            _point(client, name, PREVIOUS, old.version)
        _point(client, name, CHAMPION, version)
        return old.version if old and old.version != version else None


def decided(runs: Path, name: str, version: str, text: str) -> None:
    """Keep with a version, for who looks at it in the registry, what a rollout decided of it and why."""
    with connected(runs) as client:
        client.set_model_version_tag(name, version, DECISION_TAG, fitted(redact_text(text), TAG))


def refuse(runs: Path, name: str, version: str, text: str) -> None:
    """`decided`, and no alias of ours names the version any more."""
    decided(runs, name, version, text)
    with connected(runs) as client:
        for alias in (CHALLENGER, CHAMPION):
            if (found := _find(client, name, alias)) and found.version == version:
                client.delete_registered_model_alias(name, alias)


def find(runs: Path, name: str, reference: str) -> Version | None:
    """The version of model `name` with this alias or number."""
    with connected(runs) as client:
        return _find(client, name, reference)


def find_all(runs: Path, reference: str) -> list[Version]:
    """The version with this alias or number of each model that has one, the most recently changed model first."""
    with connected(runs) as client:
        known = _models(client)
        having = {model.name for model in known if reference in model.aliases}
        if _is_number(reference):
            having = {
                v.name for v in pages(client.search_model_versions, filter_string=f"version_number = {reference}")
            }
        found = (_find(client, model.name, reference) for model in known if model.name in having)
        return [version for version in found if version]


def models(runs: Path) -> list[str]:
    """Names of the registered models, the most recently changed first."""
    with connected(runs) as client:
        return [model.name for model in _models(client)]


def download(runs: Path, version: Version, name: str, folder: Path) -> None:
    """Bring one file of the registered model into `folder`, under its name.

    Raises:
        DataError: MLflow has no such file, or it does not come.
        Unreachable: MLflow does not answer.
    """
    with connected(runs) as client:
        place, uri = client.get_model_version_download_uri(version.name, version.version), client.tracking_uri
    from mlflow.artifacts import download_artifacts

    target = folder / name
    try:  # not under the lock: it may take minutes
        with answered(uri):
            download_artifacts(below(place, name), dst_path=str(target.parent), tracking_uri=uri)
    except (NvilaError, OSError) as error:
        if isinstance(error, Unreachable | ConfigError):
            raise
        raise DataError(
            f"MLflow does not give the file {name} of {version.uri}: {' '.join(str(error).split())}",
            where=redact_text(place),
            do="Give the folder of a checkpoint, or run the recipe again where this MLflow is set: it registers the "
            "model with its files.",
        ) from error


def _models(client: MlflowClient) -> list[RegisteredModel]:
    found = pages(client.search_registered_models, max_results=100)
    return sorted(found, key=lambda model: model.last_updated_timestamp or 0, reverse=True)


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    if client.search_registered_models(filter_string=f"name = '{name}'"):
        return
    try:
        client.create_registered_model(name, description="NVILA models, quantized for serving.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another machine was quicker
            raise


def _with_digest(client: MlflowClient, name: str, digest: str) -> Version | None:
    """The first of them."""
    found = map(_version, pages(client.search_model_versions, filter_string=f"name = '{name}'", max_results=100))
    same = (version for version in found if version.tags.get(DIGEST_TAG) == digest)
    return min(same, key=lambda version: int(version.version), default=None)


def _first(client: MlflowClient, made: Version, digest: str) -> Version:
    """The version that stays, where another machine has made one of the same model meanwhile."""
    first = _with_digest(client, made.name, digest) or made
    if first.version != made.version:
        client.delete_model_version(made.name, made.version)
    return first


def _find(client: MlflowClient, name: str, reference: str) -> Version | None:
    """By alias or number; MLflow raises for an unknown one as for an unknown model: neither is an error here."""
    from mlflow.exceptions import MlflowException

    try:
        if not _is_number(reference):
            reference = client.get_model_version_by_alias(name, reference).version
        return _version(client.get_model_version(name, reference))  # only this call fills in the aliases
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _is_number(reference: str) -> bool:
    return reference.isdecimal() and len(reference) < 10


def _point(client: MlflowClient, name: str, alias: str, version: str) -> None:
    now = _find(client, name, alias)
    if now is None or now.version != version:
        client.set_registered_model_alias(name, alias, version)


def _version(made: Any) -> Version:
    aliases = tuple(sorted(made.aliases))
    return Version(made.name, str(made.version), dict(made.tags), aliases, made.run_id or "")
