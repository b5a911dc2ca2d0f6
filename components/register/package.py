"""Lays out a checkpoint as an MLflow model: `MLmodel` with signature and loader beside the checkpoint's own files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.files import link_or_copy
from nvila.components.contracts.manifest import MANIFEST, Manifest
from nvila.components.register.served import MAX_NEW_TOKENS
from nvila.components.tracking.columns import model_name
from nvila.components.tracking.connect import uploading

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.models import ModelSignature

DATA = "model"
"""Where the checkpoint lies, as in the step's own folder: what is downloaded is that folder again."""
LOADER = "nvila.components.register.served"


def signature() -> ModelSignature:
    """Question and one medium in (text: a path, base64 or a data URL), answer out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema(
            [
                ColSpec("string", "question"),
                ColSpec("string", "image", required=False),
                ColSpec("string", "video", required=False),
            ]
        ),
        outputs=Schema([ColSpec("string", "answer")]),
        params=ParamSchema([ParamSpec("max_new_tokens", "long", MAX_NEW_TOKENS)]),
    )


def log_model(
    client: MlflowClient,
    made: Manifest,
    scratch: Path,
    *,
    run: Run,
    name: str,
    params: Mapping[str, str],
    tags: Mapping[str, str],
) -> dict[str, Any]:
    """Upload the checkpoint as a logged model, with the manifest that it can be held against wherever it is downloaded.

    Args:
        made: manifest of the quantized model; its checkpoint was found whole.
        scratch: an empty folder's path for the layout; it is removed again.
        run: that it is logged by.
        name: of the registered model; the logged one's is like it.
        params: shown with the logged model.
        tags: of the logged model.

    Returns:
        `source`, `run_id` and `model_id` for the model version.

    Raises:
        NvilaError: the place of artifacts does not take it.
    """
    logged = client.create_logged_model(
        run.info.experiment_id,
        name=model_name(name),
        source_run_id=run.info.run_id,
        params=dict(params),
        tags=dict(tags),
        model_type="nvila",
    )
    kept = f"Nothing is lost: it is in {made.folder}, and the same command goes on from here."
    try:
        with uploading("the model", logged.artifact_location, kept):
            _lay_out(made, scratch, logged.model_id)
            client.log_model_artifacts(logged.model_id, str(scratch))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    client.finalize_logged_model(logged.model_id, "READY")
    return {"source": logged.artifact_location, "run_id": run.info.run_id, "model_id": logged.model_id}


def _lay_out(made: Manifest, folder: Path, model_id: str) -> None:
    """Links where there are any: a checkpoint may have many gigabytes, and the upload follows links of files."""
    from mlflow import pyfunc
    from mlflow.models import Model

    for file in made.files.values():
        if file.uri.startswith(f"{DATA}/"):
            link = folder / file.uri
            link.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(link, Path(made.folder, file.uri).resolve())
    made.save(folder / MANIFEST)
    model = Model(signature=signature(), model_id=model_id)
    pyfunc.add_to_model(model, loader_module=LOADER, data=DATA)
    model.save(str(folder / "MLmodel"))
