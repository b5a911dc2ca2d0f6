"""From the pipeline's form fields to one checked recipe; used by the step `resolve` and by the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.recipe import Recipe, merge, parse_recipe
from nvila.components.contracts.recipe.section import Section

SHIPPED = "nvila.pipelines.recipes"
"""Where the recipes lie that come with the platform: read as data, never imported."""


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


def shipped() -> list[str]:
    """Names of the recipes that come with the platform."""
    return sorted(f.name.removesuffix(".yaml") for f in resources.files(SHIPPED).iterdir() if f.name.endswith(".yaml"))


def recipe_text(recipe: str) -> str:
    """YAML text of a shipped recipe, or `recipe` itself when it is the text.

    Raises:
        ConfigError: it is neither.
    """
    if "\n" in recipe or ":" in recipe:
        return recipe
    if recipe not in shipped():
        raise ConfigError("no recipe of that name", value=recipe, do=f"Shipped are: {', '.join(shipped())}.")
    return resources.files(SHIPPED).joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")


def read_recipe(recipe: str) -> str:
    """Like `recipe_text`, for the command line, where a path of a YAML file will do as well.

    Raises:
        ConfigError: no recipe of that name, or a file that cannot be read.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError("no such recipe file", where=recipe, do=f"Shipped recipes: {', '.join(shipped())}.")
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot be read: {error}", where=recipe) from None
    return recipe_text(recipe)


def fill_in(form: Form, where: str = "recipe", root: str = "") -> Recipe:
    """The recipe with the form's fields and overrides laid over it.

    Args:
        form: the pipeline's parameters.
        where: what messages call the recipe when it is given as text.
        root: folder that its relative paths begin at; empty leaves them relative.

    Raises:
        ConfigError: the YAML or the JSON does not parse, or the recipe is wrong.
    """
    where = form.recipe if form.recipe in shipped() else where
    content = parse_yaml(recipe_text(form.recipe), where)
    for path, value in (
        (("register", "model_name"), form.model_name),
        (("prune", "keep_ratio"), form.keep_ratio),
        (("rollout", "target"), form.target),
    ):
        if value:
            content = merge(content, {path[0]: {path[1]: value}})
    content = merge(content, _overrides(form.overrides))
    if form.data_uri:
        content = _move_data(content, form.data_uri)
    recipe = parse_recipe(content, where=where)
    return _rooted(recipe, Path(root)) if root else recipe


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The text as a mapping.

    Raises:
        ConfigError: it is no YAML, or no mapping.
    """
    try:
        content = load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}", where=where, do=_one_line(text)) from None
    except RecursionError:
        raise ConfigError("nested too deeply", where=where) from None
    if not isinstance(content, dict):
        raise ConfigError("a recipe is a mapping of sections", where=where, value=content, do=_one_line(text))
    return content


def _one_line(text: str) -> str | None:
    """What to do about a text that looks as if a form had taken its line breaks."""
    if "\n" in text.strip():
        return None
    return "A form of one line takes a shipped recipe's name, or a recipe as JSON; `nvila submit FILE` takes YAML."


class _Loader(yaml.SafeLoader):
    """The safe loader, to which dates are texts: nothing in a recipe is a date, a name may look like one."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(text: str) -> Any:
    """What the YAML text says, in types that JSON has as well.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, _Loader)


def _rooted(recipe: Recipe, root: Path) -> Recipe:
    """The recipe with every relative path of a folder made absolute."""
    content = recipe.model_dump(mode="json", by_alias=True)
    base, prune = content["model"]["base"], content["prune"]
    for section, key in (
        *((source, "path") for source in content["data"]["sources"]),
        *((base, part) for part in ("vision_tower", "llm")),
        *((prune[name], "path") for name in ("small", "large")),
    ):
        if section[key] and "://" not in section[key]:
            section[key] = str(root / section[key])
    return parse_recipe(content)


def _overrides(text: str) -> Mapping[str, Any]:
    try:
        content = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON: {error}", where="overrides", value=text) from None
    if not isinstance(content, dict):
        raise ConfigError("overrides must be a JSON object", where="overrides", value=text)
    return content


def _move_data(content: dict[str, Any], data_uri: str) -> dict[str, Any]:
    """Each source is then the folder of its name under `data_uri`, and is never built as a demonstration."""
    data = content.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    if not isinstance(sources, list) or not all(isinstance(s, dict) and "name" in s for s in sources):
        return content  # the schema says what is wrong
    moved = [
        {k: v for k, v in s.items() if k not in ("demo", "demo_scale")}
        | {"path": f"{data_uri.rstrip('/')}/{s['name']}"}
        for s in sources
    ]
    return merge(content, {"data": {"sources": moved}})
