"""The store: `store/<step>/<key>/`, one folder per piece of work. Resume, skip and clean-up all read it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nvila.components.contracts.errors import DamagedError, NvilaError, from_record, to_record
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.files import discard, read_bytes, read_json, sync_tree, write_atomic
from nvila.components.contracts.locks import WORK_SECONDS, alone
from nvila.components.contracts.manifest import KEY_CHARACTERS, START, SUSPECT, Manifest, OlderVersion
from nvila.components.contracts.manifest import MANIFEST as MANIFEST
from nvila.components.contracts.text import say

TOMBSTONE = "tombstone.json"


@dataclass(frozen=True)
class Store:
    """A folder of finished and unfinished work. A folder without a manifest is unfinished; the step resumes in it."""

    root: Path

    def folder(self, step: str, key: str) -> Path:
        """Where the step with this content key works (may not exist yet)."""
        return self.root / step / key[:KEY_CHARACTERS]

    def lock(self, step: str, key: str) -> Path:
        """Held by who does this work or looks whether it is done, so that its time is that of its last use."""
        return self.root / step / f".{key[:KEY_CHARACTERS]}.lock"

    def finished(self, step: str, key: str, inputs: Mapping[str, str] | None = None) -> Manifest | None:
        """The manifest of finished work, else None; damaged work, which is said in one line, is not finished.

        Looks at the manifest's digest and at its files' sizes. The bytes are for those who open them.

        Args:
            step, key: the work.
            inputs: digest of each input's manifest; the work must have been made from these.

        Raises:
            DataError: a newer version of the platform wrote it. Work of an older one is not there, which is said.
        """
        place = self.folder(step, key)
        if not os.path.lexists(place / MANIFEST):
            return None
        try:
            return self._sound(place, step, key, inputs)
        except OlderVersion as error:
            say(f"{step}: to be done again: {error.what}")
            return None
        except DamagedError as error:
            say(f"{step}: damaged, to be done again: {error.where}: {error.what}")
            return None

    def _sound(self, place: Path, step: str, key: str, inputs: Mapping[str, str] | None) -> Manifest:
        for path in (place, place / MANIFEST):
            if path.is_symlink():
                raise DamagedError("a link, where the store has none", where=str(path))
        manifest = Manifest.load(place / MANIFEST)
        used = {name: ref.digest for name, ref in manifest.inputs.items() if name != START}
        if (manifest.step, manifest.key) != (step, key) or (inputs is not None and used != inputs):
            raise DamagedError("the manifest of other work", where=str(place / MANIFEST))
        if os.path.lexists(place / SUSPECT):
            raise DamagedError(f"a reader found {_words(place / SUSPECT)}", where=str(place))
        for name, why in manifest.faults(deep=False, fresh=False).items():
            raise DamagedError(why, where=str(place / name))
        return manifest

    def mend(self, step: str, key: str) -> None:
        """Read closely what a reader found damaged: all that was wrong may be a file that somebody put beside it.

        Such files are deleted. The caller holds the work's lock. What is damaged stays marked.
        """
        place = self.folder(step, key)
        if not os.path.lexists(place / SUSPECT):
            return
        try:
            manifest = Manifest.load(place / MANIFEST)
        except NvilaError:  # `finished` says it
            return
        for stranger in {path for name in manifest.files if "/" in name for path in manifest.strangers(_top(name))}:
            if os.path.lexists(stranger):  # not gone with its folder
                say(f"{step}: deleted, as no step wrote it: {stranger}")
                discard(stranger)
        if not manifest.verify(deep=True):
            discard(place / SUSPECT)

    def load(self, path: str | os.PathLike[str]) -> Manifest:
        """Read a manifest lying anywhere (a KFP artifact's file is a copy) with its folder in this store set.

        Raises:
            DataError, DamagedError: as `Manifest.load`.
        """
        manifest = Manifest.load(path)
        ours = self.folder(manifest.step, manifest.key)
        if Path(path).name != MANIFEST and (ours.is_dir() or not manifest.folder):
            manifest.folder = str(ours)
        return manifest

    @contextmanager
    def working(self, step: str, key: str) -> Iterator[Path]:
        """The step's folder, locked against a second process that does the same work."""
        folder = self.folder(step, key)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(self.lock(step, key), f"{step}: another run is at the same work", WORK_SECONDS):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                say(f"{step}: removed, as it is no folder of the store: {folder}")
                folder.unlink()
            folder.mkdir(exist_ok=True)
            yield folder

    def finish(self, folder: Path, manifest: Manifest) -> Manifest:
        """Write the manifest, last and by rename, when its files are on disk: from here on the work is done."""
        sync_tree(folder)
        manifest = manifest.model_copy(update={"folder": str(folder)})
        manifest.save(folder / MANIFEST)
        return manifest

    def bury(self, step: str, key: str, run: str, error: NvilaError) -> None:
        """Leave a tombstone: within the pipeline run `run`, a retry of this work ends at once with the same verdict."""
        record = {"run": run, "error": to_record(error)}
        write_atomic(self.folder(step, key) / TOMBSTONE, json.dumps(record, indent=1))

    def buried(self, step: str, key: str, run: str) -> NvilaError | None:
        """An earlier verdict in the same run, else None."""
        record = read_json(self.folder(step, key) / TOMBSTONE)
        try:
            error = from_record(record["error"]) if record.get("run") == run else None
        except (KeyError, TypeError, ValueError):  # an earlier version's, or torn
            return None
        return error if error and error.exit_code in (Exit.USER, Exit.REJECTED) else None

    def remove(self, step: str, key: str) -> None:
        """Delete one piece of work; the manifest goes last, so that an interrupted delete leaves damaged work.

        Whoever meets a manifest whose files are gone deletes the rest too: half a deleted folder is never resumed.
        """
        folder = self.folder(step, key)
        if folder.is_symlink():  # what it leads to is not ours
            folder.unlink()
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MANIFEST:
                path.unlink()
        shutil.rmtree(folder, ignore_errors=True)


def _words(note: Path) -> str:
    """The line that a reader left."""
    try:
        return read_bytes(note).decode(errors="replace").strip()[:500] or "its files changed"
    except OSError:
        return "its files changed"


def _top(name: str) -> str:
    return name.partition("/")[0]
