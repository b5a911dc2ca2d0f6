"""Where the pods of the other steps go on this cluster: the values that the compiled pipeline's tasks take."""

from __future__ import annotations

from typing import Any

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.placement import parameters
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.results.run import Resolution
from nvila.components.contracts.site import Site


def places(manifest: str, here: Environment) -> tuple[Any, ...]:
    """From the recipe in `resolve`'s manifest and the site, in the order of the wrapper's outputs.

    They are no part of the manifest: where work is done changes no key.
    """
    recipe = Recipe.model_validate(Manifest.load(manifest).told(Resolution).recipe)
    return tuple(parameters(recipe, here.site or Site()).values())
