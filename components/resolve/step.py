"""The step `resolve`: merges the form's fields, checks the recipe, and cuts it into the slices of the other steps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.pipelines import PIPELINES
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.reader import family, layers
from nvila.components.contracts.recipe.recipe import slices
from nvila.components.contracts.results.run import Resolution
from nvila.components.contracts.step import Outcome
from nvila.components.resolve.named import recipe_named

Settings = Form


def external(settings: Mapping[str, Any], here: Environment) -> dict[str, Any]:
    """What the slices depend on besides: digest of the recipe's text and of what it extends, for shipped recipes may
    change; where its paths begin; and which part of it each step takes, for no key holds the table of steps.

    A wrong name is left to `run`, as any other mistake in the form: then there is a key for its tombstone.
    """
    try:
        texts = [member.text for member in family(recipe_named(settings["recipe"], here.root))]
    except (ConfigError, DataError):
        texts = [settings["recipe"]]
    return _known(texts, here)


def _known(texts: Iterable[str], here: Environment) -> dict[str, Any]:
    return {
        "recipe": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "root": here.root,
        "parts": {
            name: {row.name: [row.recipe, row.hands_on] for row in pipeline.steps if row.recipe}
            for name, pipeline in PIPELINES.items()
        },
    }


def run(settings: Form, inputs: Mapping[str, Manifest], out: Path, here: Environment) -> Outcome:
    """Tells `recipe` (all of it, defaults filled in) and `slices` (by step name).

    Raises:
        ConfigError: names the dotted option and the nearest right key; or the recipe is for another pipeline than this.
        DataError: a bucket has no such recipe, or refuses it.
    """
    members = list(family(recipe_named(settings.recipe, here.root)))
    recipe = fill_in(settings, root=here.root, recipe=layers(members[0], located=True, root=here.root))
    if here.pipeline not in (None, recipe.pipeline.name):
        does = "starts from a whole model" if recipe.model.base.model else "makes its own model"
        raise ConfigError(
            f"the recipe {does}, which is for the pipeline {recipe.pipeline.name}; this is {here.pipeline}",
            where="model.base.model",
            value=recipe.model.base.model,
            do=f"Start the pipeline {recipe.pipeline.name} with it; `nvila submit` chooses by the recipe.",
        )
    whole = recipe.model_dump(mode="json", by_alias=True)
    read = _known([member.text for member in members], here)
    return Outcome(kind="slices", result=Resolution(recipe=whole, slices=slices(recipe)), read=read)
