"""Walks from a served model back to the user's files over the manifests, checking every digest on the way.

The manifests are the lineage; there is no second record. A missing or altered one is shown where it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.manifest import File, InputRef, Manifest, sha256_file
from nvila.components.contracts.store import MANIFEST, Store
from nvila.components.tracking.connect import has_store
from nvila.components.tracking.registry import Version, find, models, registered_inputs

State = Literal["sound", "missing", "altered", "damaged"]
"""`altered`: the manifest's digest is another than its reader recorded. `damaged`: files of the step are."""

SOURCES_SHOWN = 30


@dataclass(frozen=True)
class Node:
    """One step's output on the way back."""

    step: str
    digest: str
    """As its reader recorded it; of the manifest itself where it is the start."""
    state: State
    detail: str = ""
    folder: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    """Digest of each input, by its name in the step."""
    sources: tuple[File, ...] = ()
    changed_sources: tuple[str, ...] = ()
    """User's files that are gone or differ from what was read."""


@dataclass(frozen=True)
class Tree:
    """All that the start depends on; each node once, readers before what they read."""

    title: str
    nodes: tuple[Node, ...]

    @property
    def sound(self) -> bool:
        """Whether every manifest and file of ours is there and as recorded. The user's files may have changed since."""
        return all(node.state == "sound" for node in self.nodes)


def trace(store_root: Path, reference: str = "champion", *, runs: Path = Path("runs"), deep: bool = False) -> Tree:
    """Walk back from a manifest or a registered version.

    Args:
        store_root: the store, where a manifest is looked for when it is not where its reader saw it.
        reference: path of a manifest or of a step's folder; an alias or a number of the registry's latest model; or
            `name@alias` or `name/number`.
        runs: the runs folder, which holds the local registry.
        deep: check the sha256 of every file, not only its size.

    Raises:
        ConfigError: the reference names nothing.
        DataError: the manifest to start from cannot be read.
    """
    path = Path(reference)
    if path.is_dir() or path.is_file():
        start = path / MANIFEST if path.is_dir() else path
        manifest = Store(store_root).load(start)
        roots = [InputRef(step=manifest.step, uri=str(start), digest=manifest.digest)]
        title = str(start)
    else:
        version = _registered(runs, reference)
        roots = registered_inputs(version)
        aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
        title = f"{version.name} version {version.version}{aliases}"
    return Tree(title, tuple(_walk(Store(store_root), roots, deep)))


def render(tree: Tree) -> str:
    """The walk as text: one block per step, its inputs by short digest, then the user's files."""
    lines = [tree.title]
    for node in tree.nodes:
        mark = "ok" if node.state == "sound" else node.state.upper()
        lines.append(f"\n{node.step}  {node.digest[:12]}  {mark}{f': {node.detail}' if node.detail else ''}")
        if node.folder:
            lines.append(f"  in    {node.folder}")
        names: dict[str, str] = {n.digest: n.step for n in tree.nodes}
        for name, digest in node.inputs.items():
            step = names.get(digest, "?")
            lines.append(f"  from  {step} {digest[:12]}{f' as {name}' if name != step else ''}")
        shown = sorted(node.sources, key=lambda file: file.uri not in node.changed_sources)[:SOURCES_SHOWN]
        for file in shown:
            changed = "  CHANGED SINCE" if file.uri in node.changed_sources else ""
            lines.append(f"  read  {file.uri}  {file.sha256[:12]}{changed}")
        if len(node.sources) > len(shown):
            lines.append(f"  read  {len(node.sources) - len(shown)} more files")
    wrong = [node.step for node in tree.nodes if node.state != "sound"]
    files = sum(len(node.sources) for node in tree.nodes)
    verdict = f"broken at {', '.join(wrong)}" if wrong else "every digest agrees"
    lines.append(f"\n{len(tree.nodes)} manifests, {files} source files: {verdict}")
    return "\n".join(lines)


def _registered(runs: Path, reference: str) -> Version:
    """The version that the reference names.

    Raises:
        ConfigError: there is none, or it was not registered by us.
    """
    separator = "@" if "@" in reference else "/"
    name, found, key = reference.rpartition(separator)
    candidates = ([name] if found else models(runs)) if has_store(runs) else []
    for model in candidates:
        version = find(runs, model, key)
        if version is None:
            continue
        if not registered_inputs(version):
            raise ConfigError("this version was not registered by a run", where=version.uri)
        return version
    raise ConfigError(
        "neither a manifest nor a version of the registry",
        value=reference,
        do=f"Registered models: {', '.join(candidates) or 'none'}. Give a path, an alias, or NAME@ALIAS.",
    )


def _walk(store: Store, roots: list[InputRef], deep: bool) -> list[Node]:
    """Each digest once, ordered so that a step comes before everything it was made from."""
    nodes: dict[str, Node] = {}
    queue = list(roots)
    while queue:
        ref = queue.pop(0)
        if ref.digest in nodes:
            continue
        manifest, node = _visit(store, ref, deep)
        nodes[ref.digest] = node
        queue.extend(manifest.inputs.values() if manifest else ())
    return _ordered(nodes, [root.digest for root in roots])


def _visit(store: Store, ref: InputRef, deep: bool) -> tuple[Manifest | None, Node]:
    try:
        path = _located(store, ref)
        manifest = store.load(path)
    except DataError as error:
        return None, Node(ref.step, ref.digest, "missing", str(error))
    if not Path(manifest.folder).exists():  # the store was moved
        manifest = manifest.model_copy(update={"folder": str(path.parent)})
    inputs = {name: one.digest for name, one in manifest.inputs.items()}
    state: State = "sound"
    detail = ""
    if manifest.digest != ref.digest:
        state, detail = "altered", f"the manifest's digest is now {manifest.digest[:12]}"
    elif wrong := manifest.verify(deep=deep):
        state, detail = "damaged", f"files gone or changed: {', '.join(wrong[:5])}"
    sources = tuple(manifest.sources)
    changed = tuple(file.uri for file in sources if _changed(file))
    return manifest, Node(manifest.step, ref.digest, state, detail, manifest.folder, inputs, sources, changed)


def _located(store: Store, ref: InputRef) -> Path:
    """Where the reader saw the manifest; after a move of the store, the same place under its new root."""
    path = Path(ref.uri)
    moved = store.root.joinpath(*path.parts[-3:])
    return moved if not path.exists() and moved.exists() else path


def _changed(file: File) -> bool:
    path = Path(file.uri)
    if "://" in file.uri:
        return False
    return not path.is_file() or path.stat().st_size != file.size_bytes or sha256_file(path) != file.sha256


def _ordered(nodes: dict[str, Node], roots: list[str]) -> list[Node]:
    """Reverse post-order: readers first."""
    done: list[Node] = []
    seen: set[str] = set()

    def visit(digest: str) -> None:
        if digest in seen:
            return
        seen.add(digest)
        for child in nodes[digest].inputs.values():
            visit(child)
        done.append(nodes[digest])

    for root in reversed(roots):
        visit(root)
    return done[::-1]
