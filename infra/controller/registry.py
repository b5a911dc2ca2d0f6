"""The model registry, asked and told by MLflow's REST API: aliases, versions, tags and small files of a version."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import DataError
from nvila.components.data.remote.artifacts import of_version
from nvila.components.tracking.columns import TAG, fitted
from nvila.components.tracking.redact import redact_text
from nvila.components.tracking.registry import APPROVED_TAG, DIGEST_TAG, PINNED_TAG
from nvila.infra.controller.mlflow_server import MlflowServer, Unknown
from nvila.infra.controller.seen import Aliases, Registered

MODELS_A_PAGE = 200
_API = "/api/2.0/mlflow"


class Registry:
    """The one that the environment names. Each of its methods raises what `MlflowServer.ask` does."""

    def __init__(self, here: Environment) -> None:
        """Nothing is asked yet.

        Raises:
            ConfigError: no server is named.
        """
        self._here, self._server = here, MlflowServer(here)

    def aliases(self) -> dict[str, Aliases]:
        """What the aliases of each model name."""
        names = [one.name for one in fields(Aliases)]
        found, page = dict[str, Aliases](), {"max_results": str(MODELS_A_PAGE)}
        while True:
            said = self._server.ask("GET", f"{_API}/registered-models/search", page)
            for model in said.get("registered_models", []):
                named = {one["alias"]: str(one["version"]) for one in model.get("aliases", [])}
                found[model["name"]] = Aliases(**{name: named[name] for name in names if name in named})
            token = said.get("next_page_token", "")
            if not token or token == page.get("page_token"):
                return found
            page["page_token"] = token

    def version(self, model: str, number: str) -> Registered | None:
        """What is registered as this version; None where nothing is, or it was deleted."""
        try:
            found = self._get("get", model, number)["model_version"]
        except Unknown:
            return None
        tags = {one["key"]: one.get("value", "") for one in found.get("tags", [])}
        return Registered(
            model=model,
            version=number,
            digest=tags.get(DIGEST_TAG, ""),
            pinned=tags.get(PINNED_TAG, ""),
            source=found.get("source", ""),
            approved_by=tags.get(APPROVED_TAG, ""),
            user=found.get("user_id", ""),
        )

    def point(self, model: str, alias: str, version: str) -> None:
        """Have an alias name a version; `Unknown` where that is gone."""
        given = {"name": model, "alias": alias, "version": version}
        self._server.ask("POST", f"{_API}/registered-models/alias", given)

    def drop(self, model: str, alias: str) -> None:
        """Have an alias name nothing; `Unknown` where the model is gone."""
        self._server.ask("DELETE", f"{_API}/registered-models/alias", {"name": model, "alias": alias})

    def tag(self, model: str, version: str, key: str, text: str) -> None:
        """Keep a text with a version, as long as MLflow takes it and without secrets; `Unknown` where that is gone."""
        given = {"name": model, "version": version, "key": key, "value": fitted(redact_text(text), TAG)}
        self._server.ask("POST", f"{_API}/model-versions/set-tag", given)

    def artifact(self, registered: Registered, name: str, partial: Path, most_bytes: int) -> str:
        """Have a file of a version in `partial`; returns its SHA-256.

        Args:
            registered: the version.
            name: of the file, below the version's folder.
            partial: where it is put.
            most_bytes: of the file.

        Raises:
            DataError: there is none, or a larger one.
            OSError: the disk.
        """
        came = 0

        def count(more: int) -> None:
            nonlocal came
            if (came := came + more) > most_bytes:
                raise DataError(f"larger than {most_bytes:,} bytes", where=f"{files.where}/{name}")

        files = of_version(registered.model, registered.version, self._here)
        return files.fetch(name, partial, count)

    def _get(self, what: str, model: str, number: str) -> dict[str, Any]:
        return self._server.ask("GET", f"{_API}/model-versions/{what}", {"name": model, "version": number})
