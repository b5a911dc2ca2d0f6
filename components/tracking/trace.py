"""Walks from a served model back to the user's files over the manifests, and says of each what was checked.

The manifests are the lineage; there is no second record. A missing or altered one is shown where it stands. All of
them are read in one store: that of the start. Only what fine-tuning started from may lie in another one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from nvila.components.contracts.digests import file_sha256
from nvila.components.contracts.errors import ConfigError, DamagedError, NvilaError, to_record
from nvila.components.contracts.manifest import START, File, InputRef, Manifest, OlderVersion
from nvila.components.contracts.places import is_address
from nvila.components.contracts.store import MANIFEST, Store
from nvila.components.tracking.media import changed_media
from nvila.components.tracking.named import named
from nvila.components.tracking.registry import registered_inputs

State = Literal["sound", "missing", "altered", "damaged", "older"]
"""`older`: written by a version of the platform whose manifests are not read any more.
`altered`: the manifest's digest is another than its reader recorded. `damaged`: files of the step are."""

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
    """User's files that are gone or differ from what was read: annotations always, media where asked for."""
    media: int = 0
    """How many of the user's pictures and clips were read."""


@dataclass(frozen=True)
class Tree:
    """All that the start depends on; each node once, readers before what they read."""

    title: str
    nodes: tuple[Node, ...]
    deep: bool = False
    """Whether files were read; else only their sizes were looked at."""

    @property
    def sound(self) -> bool:
        """Whether every manifest and file of ours is there and as recorded. The user's files may have changed since."""
        return all(node.state == "sound" for node in self.nodes)

    @property
    def unchanged(self) -> bool:
        """Whether all of it is as recorded, the user's files that were looked at among them."""
        return self.sound and not any(node.changed_sources for node in self.nodes)


def trace(store_root: Path, reference: str = "champion", *, runs: Path = Path("runs"), deep: bool = False) -> Tree:
    """Walk back from a manifest or a registered version.

    Args:
        store_root: the store. A path in another one, or a version whose manifest is not in this one, is walked there.
        reference: path of a manifest, of a step's folder or of a checkpoint in it, or a version (`named`).
        runs: the runs folder, which holds the local registry.
        deep: read every file and every picture and clip, not only their sizes.

    Raises:
        ConfigError: the reference names nothing, or what has no lineage.
        DataError, DamagedError: the manifest or version to start from cannot be read.
    """
    if is_address(reference):
        raise ConfigError("a checkpoint from elsewhere has no lineage", where=reference, do="Name one of a run.")
    found = named(reference, runs)
    if isinstance(found, Path):
        beside = found.parent / MANIFEST
        start = found if found.is_file() else beside if beside.is_file() else found / MANIFEST
        manifest = Store(store_root).load(start)
        if start.absolute().parts[-3:-2] == (manifest.step,):
            store_root = start.absolute().parents[2]
        roots = [InputRef(step=manifest.step, uri=str(start), digest=manifest.digest)]
        title = str(start)
    else:
        roots = registered_inputs(found)
        if not any(_place(store_root, ref).exists() for ref in roots):
            store_root = Path(roots[0].uri).parents[2]
        aliases = f" ({', '.join(found.aliases)})" if found.aliases else ""
        title = f"{found.name} version {found.version}{aliases}"
    return Tree(title, tuple(_walk(Store(store_root), roots, deep)), deep)


def render(tree: Tree) -> str:
    """The walk as text: one block per step, its inputs by short digest, then the user's files."""
    lines = [tree.title]
    fine = "ok" if tree.deep else "ok (sizes)"
    for node in tree.nodes:
        mark = fine if node.state == "sound" else node.state.upper()
        lines.append(f"\n{node.step}  {node.digest[:12]}  {mark}{f': {node.detail}' if node.detail else ''}")
        if node.folder:
            lines.append(f"  in    {node.folder}")
        names: dict[str, str] = {n.digest: n.step for n in tree.nodes}
        for name, digest in node.inputs.items():
            step = names.get(digest, "?")
            lines.append(f"  from  {step} {digest[:12]}{f' as {name}' if name != step else ''}")
        recorded = {file.uri: file.sha256[:12] for file in node.sources}
        every = [*node.changed_sources, *(uri for uri in recorded if uri not in node.changed_sources)]
        for uri in every[:SOURCES_SHOWN]:
            changed = "  CHANGED SINCE" if uri in node.changed_sources else ""
            lines.append(f"  read  {uri}  {recorded.get(uri, '')}{changed}")
        if len(every) > SOURCES_SHOWN:
            lines.append(f"  read  {len(every) - SOURCES_SHOWN} more files")
    return "\n".join([*lines, "", _verdict(tree)])


def told(tree: Tree) -> dict[str, Any]:
    """The walk for programs."""
    nodes = [asdict(node) | {"sources": [file.model_dump() for file in node.sources]} for node in tree.nodes]
    told = {"title": tree.title, "deep": tree.deep, "sound": tree.sound, "unchanged": tree.unchanged, "nodes": nodes}
    lost = DamagedError(_verdict(tree), where=tree.title, do="Run the recipe again; it makes what is missing anew.")
    return told if tree.unchanged else told | {"error": to_record(lost)}


def _verdict(tree: Tree) -> str:
    """The last line: how much was looked at, how closely, and what came of it."""
    wrong = [node.step for node in tree.nodes if node.state != "sound"]
    changed = sum(len(node.changed_sources) for node in tree.nodes)
    counted = f"{len(tree.nodes)} manifests, {sum(len(node.sources) for node in tree.nodes)} source files"
    if tree.deep:
        counted += f", {sum(node.media for node in tree.nodes)} media files"
        result = "every digest agrees"
    else:
        result = "every manifest's digest and every file's size agrees; --deep reads the files, and the media"
    if changed:
        result = f"{changed} of the user's files changed since"
    if wrong:
        result = f"broken at {', '.join(wrong)}"
    return f"{counted}: {result}"


def _walk(store: Store, roots: list[InputRef], deep: bool) -> list[Node]:
    """Each digest once, ordered so that a step comes before everything it was made from."""
    nodes: dict[str, Node] = {}
    queue = [(ref, store) for ref in roots]
    while queue:
        ref, place = queue.pop(0)
        if ref.digest in nodes:
            continue
        manifest, node = _visit(place, ref, deep)
        nodes[ref.digest] = node
        below = manifest.inputs.items() if manifest else ()
        queue.extend((child, _store_of(name, child, place)) for name, child in below)
    return _ordered(nodes, [root.digest for root in roots])


def _visit(store: Store, ref: InputRef, deep: bool) -> tuple[Manifest | None, Node]:
    path = _place(store.root, ref)
    try:
        manifest = store.load(path)
    except NvilaError as error:
        here: State = "older" if isinstance(error, OlderVersion) else "damaged"
        state = here if path.exists() else "missing"
        return None, Node(ref.step, ref.digest, state, str(error))
    inputs = {name: one.digest for name, one in manifest.inputs.items()}
    state, detail, media = "sound", "", 0
    changed = [file.uri for file in manifest.sources if _changed(file, deep)]
    if manifest.digest != ref.digest:
        state, detail = "altered", f"the manifest's digest is now {manifest.digest[:12]}"
    elif wrong := manifest.faults(deep=deep, fresh=deep):
        state, detail = "damaged", "; ".join(f"{name}: {why}" for name, why in list(wrong.items())[:5])
    elif deep:
        media, others = changed_media(manifest)
        changed += others
    return manifest, Node(
        manifest.step,
        ref.digest,
        state,
        detail,
        manifest.folder,
        inputs,
        tuple(manifest.sources),
        tuple(changed),
        media,
    )


def _place(store_root: Path, ref: InputRef) -> Path:
    """A manifest's place in a store; of one that lies in none, where its reader saw it."""
    path = Path(ref.uri)
    return store_root.joinpath(*path.parts[-3:]) if path.parent.parent.name == ref.step else path


def _store_of(name: str, ref: InputRef, store: Store) -> Store:
    """Where a step's input lies: in its store, but for a model of another run that it started from."""
    elsewhere = name == START and not _place(store.root, ref).exists() and Path(ref.uri).exists()
    return Store(Path(ref.uri).parents[2]) if elsewhere else store


def _changed(file: File, deep: bool) -> bool:
    path = Path(file.uri)
    if "://" in file.uri:
        return False
    try:
        return path.stat().st_size != file.size_bytes or file_sha256(path, fresh=deep) != file.sha256
    except OSError:
        return True


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
