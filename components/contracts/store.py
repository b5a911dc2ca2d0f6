"""The store: `store/<step>/<key>/`, one folder per piece of work. Resume, skip and clean-up all read it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest, write_atomic
from nvila.components.contracts.progress import waiting_for

MANIFEST = "manifest.json"
TOMBSTONE = "tombstone.json"
KEY_CHARACTERS = 20
"""Characters of the 64 that name the folder: 80 bits, so that two keys never meet and paths stay readable."""


@dataclass(frozen=True)
class Store:
    """A folder of finished and unfinished work. A folder without a manifest is unfinished; the step resumes in it."""

    root: Path

    def folder(self, step: str, key: str) -> Path:
        """Where the step with this content key works (may not exist yet)."""
        return self.root / step / key[:KEY_CHARACTERS]

    def finished(self, step: str, key: str) -> Manifest | None:
        """The manifest of finished work whose files are all there with the right sizes, else None."""
        path = self.folder(step, key) / MANIFEST
        if not path.is_file():
            return None
        manifest = Manifest.load(path).model_copy(update={"folder": str(path.parent)})
        return None if manifest.key != key or manifest.verify() else manifest

    def load(self, path: str | os.PathLike[str]) -> Manifest:
        """Read a manifest lying anywhere (a KFP artifact's file is a copy) with its folder in this store set."""
        manifest = Manifest.load(path)
        if not manifest.folder:
            manifest = manifest.model_copy(update={"folder": str(self.folder(manifest.step, manifest.key))})
        return manifest

    @contextmanager
    def working(self, step: str, key: str) -> Iterator[Path]:
        """The step's folder, locked against a second process that does the same work."""
        folder = self.folder(step, key)
        folder.mkdir(parents=True, exist_ok=True)
        lock_path = self.root / step / f".{key[:KEY_CHARACTERS]}.lock"
        with lock_path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting_for(f"{step}: another run is at the same work; waiting for what comes of it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder

    def finish(self, folder: Path, manifest: Manifest) -> Manifest:
        """Write the manifest, last and by rename: from here on the work is done."""
        manifest = manifest.model_copy(update={"folder": str(folder)})
        manifest.save(folder / MANIFEST)
        return manifest

    def bury(self, step: str, key: str, run: str, error: NvilaError) -> None:
        """Leave a tombstone: within the pipeline run `run`, a retry of this work ends at once with the same verdict."""
        record = {"run": run, "exit_code": int(error.exit_code), "error": type(error).__name__, "message": str(error)}
        write_atomic(self.folder(step, key) / TOMBSTONE, json.dumps(record, indent=1))

    def buried(self, step: str, key: str, run: str) -> tuple[Exit, str] | None:
        """Exit code and message of an earlier verdict in the same run, else None."""
        path = self.folder(step, key) / TOMBSTONE
        if not path.is_file():
            return None
        record = json.loads(path.read_text())
        return (Exit(record["exit_code"]), record["message"]) if record["run"] == run else None

    def remove(self, step: str, key: str) -> None:
        """Delete one piece of work; the manifest goes last, so that an interrupted delete leaves damaged work.

        Whoever meets a manifest whose files are gone deletes the rest too: half a deleted folder is never resumed.
        """
        folder = self.folder(step, key)
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MANIFEST:
                path.unlink()
        shutil.rmtree(folder, ignore_errors=True)
