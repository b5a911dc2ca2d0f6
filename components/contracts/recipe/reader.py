"""From a recipe's name, text or file to its layers: the documents it consists of, base first, laid over each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.layers import EXTENDS, Layers, short

SHIPPED = "nvila.pipelines.recipes"
"""Where the recipes lie that come with the platform: read as data, never imported."""
SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Document:
    """One YAML document."""

    name: str
    """What messages call it."""
    text: str
    path: Path | None = None
    """Of its file; None for a text without a place, which extends shipped recipes only."""

    @cached_property
    def content(self) -> dict[str, Any]:
        """The text as a mapping.

        Raises:
            ConfigError: it is no YAML, or no mapping.
        """
        try:
            content = load_yaml(self.text)
        except yaml.YAMLError as error:
            message = f"not YAML: {' '.join(str(error).split())}"
            raise ConfigError(message, where=self.name, do=_one_line(self.text)) from None
        except RecursionError:
            raise ConfigError("nested too deeply", where=self.name) from None
        if not isinstance(content, dict):
            message = "a recipe is a mapping of sections"
            raise ConfigError(message, where=self.name, value=short(content), do=_one_line(self.text))
        return content

    @property
    def about(self) -> str:
        """What its first line says."""
        return self.text.partition("\n")[0].removeprefix("#").strip()

    def parent(self) -> Document | None:
        """What it extends.

        Raises:
            ConfigError: that is not there, or not for this document to name.
        """
        named = self.content.get(EXTENDS)
        if named is None:
            return None
        if not isinstance(named, str):
            raise ConfigError("not the name of a recipe", where=f"{self.name}: {EXTENDS}", value=short(named))
        if not named.endswith(SUFFIXES):
            return shipped_document(named, where=f"{self.name}: {EXTENDS}")
        if self.path is None:
            do = "Name a shipped recipe, or give the file to `nvila submit FILE`, which reads what it extends."
            raise ConfigError("a recipe given as text extends no file", where=self.name, value=named, do=do)
        return file_document(self.path.parent / named)


def shipped() -> list[str]:
    """Names of the recipes that come with the platform."""
    return sorted(f.name.removesuffix(".yaml") for f in resources.files(SHIPPED).iterdir() if f.name.endswith(".yaml"))


def shipped_document(name: str, where: str | None = None) -> Document:
    """The shipped recipe of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in shipped():
        do = f"Shipped are: {', '.join(shipped())}."
        raise ConfigError("no recipe of that name", where=where, value=name, do=do)
    return Document(name, resources.files(SHIPPED).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))


def file_document(path: Path) -> Document:
    """The recipe in this file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        if path.is_file():
            return Document(str(path), path.read_text(encoding="utf-8"), path)
        raise ConfigError("no such recipe file", where=str(path), do=f"Shipped recipes: {', '.join(shipped())}.")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from None


def document(recipe: str) -> Document:
    """A shipped recipe by its name, or `recipe` itself when it is the text of one.

    Raises:
        ConfigError: it is neither.
    """
    return Document("recipe", recipe) if "\n" in recipe or ":" in recipe else shipped_document(recipe)


def named_document(recipe: str) -> Document:
    """Like `document`, for the command line, where a path of a YAML file will do as well."""
    return file_document(Path(recipe)) if recipe.endswith(SUFFIXES) else document(recipe)


def family(first: Document) -> Iterator[Document]:
    """The document, the one that it extends, and so on.

    Raises:
        ConfigError: one of them is not there, or extends itself.
    """
    names: list[str] = []
    places: list[Path | str] = []
    found: Document | None = first
    while found is not None:
        names.append(found.name)
        place = found.path.resolve() if found.path else found.name
        if place in places:
            raise ConfigError(f"recipes extend each other in a circle: {' -> '.join(names)}", where=first.name)
        places.append(place)
        yield found
        found = found.parent()


def layers(first: Document) -> Layers:
    """The document over all that it extends.

    Raises:
        ConfigError: a document that is not there or no YAML, a circle, an unknown key.
    """
    laid = Layers(first.name)
    for member in reversed(list(family(first))):
        content = {key: value for key, value in member.content.items() if key != EXTENDS}
        laid = laid.over(content, member.name)
    return laid


def self_contained(first: Document) -> str:
    """The text of a recipe that no file is needed for: its own, or what it comes to where it extends a file."""
    if all(member.path is None for member in list(family(first))[1:]):
        return first.text
    return yaml.safe_dump(layers(first).content, sort_keys=False, allow_unicode=True)


def _one_line(text: str) -> str | None:
    """What to do about a text that looks as if a form had taken its line breaks."""
    if "\n" in text.strip():
        return None
    return "A form of one line takes a shipped recipe's name, or a recipe as JSON; `nvila submit FILE` takes YAML."


class _Loader(yaml.SafeLoader):
    """The safe loader, to which dates are texts: nothing in a recipe is a date, a name may look like one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As usual, but for a key that is there twice, of which one would be lost."""
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
            keys.add(key.value)
        return node


_JSON = {None, *(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))}
_Loader.yaml_constructors = {tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _JSON}
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
