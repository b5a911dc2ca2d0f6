"""The recipe that the form names: a shipped one, a text, a file on the shared volume, or an object in a bucket."""

from __future__ import annotations

from nvila.components.contracts.recipe.reader import MOST_BYTES, SUFFIXES, Document, decoded, named_document
from nvila.components.data.remote.s3text import SCHEME, read_bytes


def recipe_named(recipe: str, root: str) -> Document:
    """What the form's field says.

    Args:
        recipe: the field.
        root: folder that a relative path begins at.

    Raises:
        ConfigError: no such recipe, or no text.
        DataError: the bucket has no such object, or refuses.
        Unreachable: the bucket's server does not answer.
    """
    if recipe.startswith(SCHEME) and recipe.lower().endswith(SUFFIXES):
        return decoded(recipe, read_bytes(recipe, MOST_BYTES + 1))
    return named_document(recipe, root)
