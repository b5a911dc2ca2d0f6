"""The pipeline's form: what KFP's UI and the command line ask for, and the checked recipe that it comes to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.places import is_version
from nvila.components.contracts.recipe.layers import Layers, parse_recipe
from nvila.components.contracts.recipe.reader import document, layers
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.section import Section


class Form(Section):
    """The pipeline's parameters. KFP's UI shows their names, and one line for each to write in."""

    recipe: str
    """Name of a shipped recipe, or the text of one: YAML, or in one line JSON, which is YAML too."""
    data_uri: str = ""
    """Folder with one folder per source; empty keeps the recipe's paths."""
    model_name: str = ""
    """Name in the registry; empty keeps the recipe's."""
    keep_ratio: float = 0.0
    """Share of the SFT data that stays; 0 keeps the recipe's."""
    target: str = ""
    """Where to serve; empty keeps the recipe's."""
    overrides: str = "{}"
    """JSON object laid over the recipe."""


def fill_in(form: Form, root: str = "", recipe: Layers | None = None) -> Recipe:
    """The recipe with the form's fields and overrides laid over it.

    Args:
        form: the pipeline's parameters.
        root: folder that its relative paths begin at; empty leaves them relative.
        recipe: what `form.recipe` has been read to already, with the files' names for messages.

    Raises:
        ConfigError: the YAML or the JSON does not parse, or the recipe is wrong.
    """
    laid = recipe or layers(document(form.recipe))
    if form.model_name:
        laid = laid.over({"register": {"model_name": form.model_name}}, "model_name")
    if form.keep_ratio:
        laid = laid.over({"prune": {"keep_ratio": form.keep_ratio}}, "keep_ratio")
    if form.target:
        laid = laid.over({"rollout": {"target": form.target}}, "target")
    overrides = _overrides(form.overrides)
    laid = laid.over(overrides, "overrides")
    if form.data_uri:
        laid = _move_data(laid, form.data_uri)
    filled = laid.recipe()
    _prunes_as_asked(form, overrides, filled)
    return _rooted(filled, Path(root)) if root else filled


def _prunes_as_asked(form: Form, overrides: Mapping[str, Any], recipe: Recipe) -> None:
    """Whoever asks for a share must not get everything, because the recipe has pruning switched off."""
    asked = ["keep_ratio"] if form.keep_ratio else []
    asked += [f"prune.{name}" for name, value in (overrides.get("prune") or {}).items() if value is not None]
    asked = [name for name in asked if name != "prune.method"]
    if asked and recipe.prune.methods == {"none"}:
        raise ConfigError("nothing is pruned: the method is none", where=asked[0], do="Name another in prune.method.")
    if asked and not recipe.train.pruned:
        raise ConfigError(
            "nothing is pruned: no stage has pruned: true", where=asked[0], do="Set it where it is to be."
        )


def _rooted(recipe: Recipe, root: Path) -> Recipe:
    """The recipe with every relative path of a folder made absolute."""
    content = recipe.model_dump(mode="json", by_alias=True)
    base, prune = content["model"]["base"], content["prune"]
    for section, key in (
        *((source, "path") for source in content["data"]["sources"]),
        *((base, part) for part in ("vision_tower", "llm")),
        *((prune[name], "path") for name in ("small", "large") if not is_version(prune[name]["path"] or "")),
    ):
        if section[key] and "://" not in section[key]:
            section[key] = str(root / section[key])
    return parse_recipe(content)


def _overrides(text: str) -> Mapping[str, Any]:
    try:
        content = json.loads(text or "{}")
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}", where="overrides", value=text) from None
    if not isinstance(content, dict):
        raise ConfigError("overrides must be a JSON object", where="overrides", value=text)
    return content


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
