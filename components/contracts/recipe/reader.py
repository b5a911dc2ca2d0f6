"""From a recipe's name, text or file to its layers: the documents it consists of, base first, laid over each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.layers import EXTENDS, Layers, short
from nvila.components.contracts.recipe.section import MOST_CHARACTERS
from nvila.components.contracts.recipe.yaml12 import MOST_BYTES, dump_yaml, load_yaml
from nvila.components.contracts.text import brief

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
        except ValueError as error:
            raise ConfigError(f"cannot be read as YAML: {error}", where=self.name, do=_one_line(self.text)) from None
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
        if not named.lower().endswith(SUFFIXES):
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
        do = f"Shipped are: {', '.join(shipped())}. The name of a file ends with {' or '.join(SUFFIXES)}."
        raise ConfigError("no recipe of that name", where=where, value=name, do=do)
    return Document(name, resources.files(SHIPPED).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))


def file_document(path: Path) -> Document:
    """The recipe in this file.

    Raises:
        ConfigError: it cannot be read, or is longer than a recipe may be.
    """
    try:
        if not path.exists():
            raise ConfigError("no such recipe file", where=str(path), do=f"Shipped recipes: {', '.join(shipped())}.")
        if not path.is_file():
            raise ConfigError("not a file", where=str(path), do="A recipe is a file of YAML.")
        with path.open("rb") as file:
            written = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return decoded(str(path), written, path)


def decoded(name: str, written: bytes, path: Path | None = None) -> Document:
    """The recipe of a file, or of what is kept like one; one byte more than a recipe may have will do.

    Raises:
        ConfigError: it is longer than that, or no UTF-8.
    """
    if len(written) > MOST_BYTES:
        raise ConfigError(f"a recipe has at most {MOST_BYTES:,} bytes", where=name)
    try:
        return Document(name, written.decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        what = "UTF-16" if written.startswith((b"\xff\xfe", b"\xfe\xff")) else f"not UTF-8 at byte {error.start:,}"
        raise ConfigError(f"the file is {what}", where=name, do="Save it as UTF-8.") from None


def document(recipe: str) -> Document:
    """A shipped recipe by its name, or `recipe` itself when it is the text of one.

    Raises:
        ConfigError: it is neither.
    """
    return Document("recipe", recipe) if "\n" in recipe or ":" in recipe else shipped_document(recipe)


def named_document(recipe: str, folder: str = "") -> Document:
    """Like `document`, where a path of a YAML file will do as well; a relative one begins at `folder`."""
    is_file = recipe.lower().endswith(SUFFIXES) and not re.search("\n|: ", recipe)
    return file_document(Path(folder, recipe)) if is_file else document(recipe)


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
            circle = brief(" -> ".join(names), 600)
            raise ConfigError(f"recipes extend each other in a circle: {circle}", where=first.name)
        places.append(place)
        yield found
        found = found.parent()


def layers(first: Document, *, located: bool = False, root: str = "") -> Layers:
    """The document over all that it extends. A file that says no `name` is called as the file.

    Args:
        first: the document on top.
        located: let the relative paths in a file begin at its folder. Else they stay as they are written, and begin
            where the run does: for a cluster, which has none of these folders.
        root: folder that the paths of a located file are relative to, where they lie in it; the working directory.

    Raises:
        ConfigError: a document that is not there or no YAML, or a circle.
    """
    laid = Layers(first.name)
    for member in reversed(list(family(first))):
        content = {key: value for key, value in member.content.items() if key != EXTENDS}
        if member is first and first.name.lower().endswith(SUFFIXES) and content.get("name") is None:
            content["name"] = _name(Path(first.name))
        laid = laid.over(content, member.name, _folder(member.path, Path(root)) if located and member.path else "")
    return laid


def self_contained(first: Document, laid: Layers) -> str:
    """The text of a recipe that no file is needed for: its own, where that comes to the same as `laid` without it."""
    if all(member.path is None for member in list(family(first))[1:]):
        alone = Document(first.name, first.text)
        if layers(alone).content == laid.content:
            return first.text
    return dump_yaml(laid.content)


def _name(path: Path) -> str:
    """A recipe's name by its file's: `My plates.yaml` is `my-plates`."""
    return re.sub(r"[^a-z0-9.]+", "-", path.stem.lower()).strip("-.")[:MOST_CHARACTERS]


def _folder(path: Path, root: Path) -> str:
    """Where the relative paths in this file begin: empty where that is `root`, relative where it is below, or absolute.

    So a recipe's paths are the same, and so is its work, however its file was named.
    """
    folder = path.parent.resolve() if ".." in path.parts else path.parent.absolute()
    root = root.absolute()
    if not folder.is_relative_to(root):
        return str(folder)
    return "" if folder == root else str(folder.relative_to(root))


def _one_line(text: str) -> str | None:
    """What to do about a text that looks as if a form had taken its line breaks."""
    if "\n" in text.strip():
        return None
    return "A form of one line takes a recipe's name, its address (`recipes/mine.yaml`, `s3://...`), or itself as JSON."
