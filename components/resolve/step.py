"""The step `resolve`: merges the form's fields, checks the recipe, and cuts it into the slices of the other steps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.reader import Form, fill_in, recipe_text, shipped
from nvila.components.contracts.recipe.recipe import slices
from nvila.components.contracts.results.run import Resolution
from nvila.components.contracts.step import Outcome

Settings = Form


def external(settings: Mapping[str, Any], here: Environment) -> dict[str, str]:
    """Digest of the recipe's text, for a shipped recipe may change under its name; and where its paths begin.

    A wrong name is left to `run`, as any other mistake in the form: then there is a key for its tombstone.
    """
    recipe = settings["recipe"]
    text = recipe_text(recipe) if recipe in shipped() else recipe
    return {"recipe": hashlib.sha256(text.encode()).hexdigest(), "root": here.root}


def run(settings: Form, inputs: Mapping[str, Manifest], out: Path, here: Environment) -> Outcome:
    """Tells `recipe` (all of it, defaults filled in) and `slices` (by step name).

    Raises:
        ConfigError: names the dotted option and the nearest right key.
    """
    recipe = fill_in(settings, root=here.root)
    whole = recipe.model_dump(mode="json", by_alias=True)
    return Outcome(kind="slices", result=Resolution(recipe=whole, slices=slices(recipe)))
