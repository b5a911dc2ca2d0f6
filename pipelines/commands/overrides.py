"""What a command asks for: a recipe by name or file, and `--override key=value` laid over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.layers import Layers, Value, index_of, together
from nvila.components.contracts.recipe.reader import layers, named_document, self_contained, shipped
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.yaml12 import load_yaml
from nvila.components.contracts.text import brief

OPTION = "--override"


def asked_for(recipe: str, overrides: Iterable[str], *, here: bool = True, **fields: Any) -> tuple[Form, Recipe]:
    """The form of a run, and the checked recipe that it comes to.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        overrides: `dotted.key=value` pairs.
        here: whether it runs on this machine, where the relative paths in a file begin at its folder.
        fields: further fields of the form.

    Raises:
        ConfigError: the recipe or an override is wrong.
    """
    first = named_document(recipe)
    laid = layers(first, located=here)
    overlay = parse_overrides(laid, overrides)
    text = recipe if recipe in shipped() else self_contained(first, laid)
    form = Form(recipe=text, overrides=overlay, **fields)
    return form, fill_in(form, recipe=laid)


def remarks(recipe: str, checked: Recipe) -> list[str]:
    """What a person should know of a recipe that is right: gates that let everything pass, a name that is another's.

    Args:
        recipe: name of a shipped recipe, or path of a YAML file.
        checked: what it comes to.
    """
    found = [checked.open_gates] if checked.open_gates else []
    if recipe not in shipped() and checked.name in shipped():
        model = checked.register_.model_name
        found.append(
            f"{brief(recipe)} has the name {checked.name} of a shipped recipe, and its model is {model}: change it"
        )
    return found


def parse_overrides(recipe: Layers, pairs: Iterable[str]) -> dict[str, Any]:
    """The layer that `dotted.key=value` pairs come to; values are JSON or YAML.

    A key may go on into a list or a table: `model.s2_scales.0=14` changes one number and keeps the others.

    Raises:
        ConfigError: a pair without `=`, an unknown key, or an index that the recipe does not have.
    """
    overlay, faults = Layers(OPTION), list[ConfigError]()
    for pair in pairs:
        try:
            key, value = _parsed(pair)
            one = _nest(recipe.tree, key.split("."), value, ())
        except ConfigError as error:
            faults.append(error)
        else:
            recipe, overlay = recipe.over(one, OPTION), overlay.over(one, OPTION)
    if faults := [*faults, *overlay.faults]:
        raise together(faults, OPTION)
    return overlay.content


def _nest(tree: Any, path: Sequence[str], value: Any, above: Sequence[str]) -> Any:
    """What to lay over `tree`, which stands at the path `above`, so that `path` in it becomes `value`."""
    if not path:
        return value
    if isinstance(tree, Value):
        return _changed(tree.content, path, value, above)
    head, rest = path[0], path[1:]
    below = tree[index_of(tree, head, above, OPTION)] if isinstance(tree, list) else (tree or {}).get(head)
    return {head: _nest(below, rest, value, [*above, head])}


def _changed(content: Any, path: Sequence[str], value: Any, above: Sequence[str]) -> Any:
    """A copy of a list or a table with one value changed."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if not isinstance(content, list):
        table = content if isinstance(content, dict) else {}
        return table | {head: _changed(table.get(head), rest, value, [*above, head])}
    index = index_of(content, head, above, OPTION)
    return [*content[:index], _changed(content[index], rest, value, [*above, head]), *content[index + 1 :]]


def _parsed(pair: str) -> tuple[str, Any]:
    key, equals, text = pair.partition("=")
    if not equals or not key:
        raise ConfigError("an override is written dotted.key=value", where=OPTION, value=pair)
    try:
        return key, load_yaml(text)
    except ValueError as error:
        do = "A text with signs of YAML in it stands in quotes of its own."
        raise ConfigError(
            f"cannot be read as YAML: {error}", where=f"{OPTION} {brief(key)}", value=text, do=do
        ) from None
