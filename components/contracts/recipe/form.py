"""The pipeline's form: what KFP's UI and the command line ask for, and the checked recipe that it comes to."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.pipelines import Pipeline
from nvila.components.contracts.recipe.layers import Layers
from nvila.components.contracts.recipe.reader import document, layers
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.section import Section


class Form(Section):
    """The pipeline's parameters. KFP's UI shows their names, and one line for each to write in."""

    recipe: str
    """RECIPES; or your own recipe: the path of a file that ends with .yaml, where a relative one begins at the shared
    volume; s3://bucket/name.yaml; or its text, YAML or, as a field of the UI's form takes one line, JSON."""
    start_from: str = ""
    """The model to fine-tune: a version of the registry (NAME@champion, NAME/3), hf://owner/name@revision,
    s3://bucket/prefix, or a folder on the shared volume; empty takes the recipe's."""
    data_uri: str = ""
    """Folder that holds one folder per source of the recipe; a relative one begins at the shared volume. Empty takes
    the recipe's own paths."""
    model_name: str = ""
    """Name in the model registry; empty takes the recipe's."""
    keep_ratio: float = 0.0
    """Share of the SFT data that pruning keeps, above 0 up to 1; 0 takes the recipe's."""
    target: str = ""
    """Where to serve: TARGETS; empty takes the recipe's."""
    overrides: dict[str, Any] = {}
    """Laid over the recipe: JSON such as {"evaluate": {"limit": 200}}."""

    @field_validator("overrides")
    @classmethod
    def _with_whole_numbers(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        """KFP hands structs on as protobuf's, which know no whole numbers: 200 comes back as 200.0."""
        return dict(_whole(overrides))


def given(form: Form, pipeline: Pipeline) -> dict[str, Any]:
    """The parameters of a run: the fields that this pipeline asks for."""
    return form.model_dump(include=set(pipeline.form))


def fill_in(form: Form, root: str = "", recipe: Layers | None = None) -> Recipe:
    """The recipe with the form's fields and overrides laid over it.

    Args:
        form: the pipeline's parameters.
        root: folder that its relative paths begin at; empty leaves them relative.
        recipe: what `form.recipe` has been read to already, with the files' names for messages.

    Raises:
        ConfigError: the YAML does not parse, or the recipe is wrong.
    """
    laid = recipe or layers(document(form.recipe))
    if form.start_from:
        laid = laid.over({"model": {"base": {"model": form.start_from}}}, "start_from")
    if form.model_name:
        laid = laid.over({"register": {"model_name": form.model_name}}, "model_name")
    if form.keep_ratio:
        laid = laid.over({"prune": {"keep_ratio": form.keep_ratio}}, "keep_ratio")
    if form.target:
        laid = laid.over({"rollout": {"target": form.target}}, "target")
    laid = laid.over(form.overrides, "overrides")
    if form.data_uri:
        laid = _move_data(laid, form.data_uri)
    filled = laid.recipe()
    _prunes_as_asked(form, filled)
    if root:
        whole = filled.model_dump(mode="json", by_alias=True)
        filled = Layers(laid.name).over(whole, laid.name, folder=root).recipe()
    return filled


def _prunes_as_asked(form: Form, recipe: Recipe) -> None:
    """Whoever asks for a share must not get everything, because the recipe has pruning switched off."""
    asked = ["keep_ratio"] if form.keep_ratio else []
    asked += [f"prune.{name}" for name, value in dict(form.overrides.get("prune") or {}).items() if value is not None]
    asked = [name for name in asked if name != "prune.method"]
    if asked and recipe.prune.methods == {"none"}:
        raise ConfigError("nothing is pruned: the method is none", where=asked[0], do="Name another in prune.method.")
    if asked and not recipe.train.pruned:
        raise ConfigError(
            "nothing is pruned: no stage has pruned: true", where=asked[0], do="Set it where it is to be."
        )


def _whole(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _whole(below) for key, below in content.items()}
    if isinstance(content, list):
        return [_whole(below) for below in content]
    return int(content) if isinstance(content, float) and content.is_integer() else content


def _move_data(laid: Layers, data_uri: str) -> Layers:
    """Each source is then the folder of its name under `data_uri`, and is never built as a demonstration."""
    data = laid.content.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    if not isinstance(sources, list) or not all(isinstance(s, dict) and "name" in s for s in sources):
        return laid  # the schema says what is wrong
    moved = {
        str(index): {"path": f"{data_uri.rstrip('/')}/{source['name']}", "demo": None, "demo_scale": None}
        for index, source in enumerate(sources)
    }
    return laid.over({"data": {"sources": moved}}, "data_uri")
