"""`make clean`: removes what the platform made in this folder, and nothing of its user's. Needs no installed package.

`store` and `runs` are the platform's. In `data` only demonstration sources are, and only while they are as they were
built: where a file was added or changed, the folder stays. Whatever lies behind a link stays too.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from nvila.components.data.stamp import STAMP, as_built

OURS = ("store", "runs")
DATA = "data"
CHILD = b"nvila.pipelines.local.child"
COMMAND = Path(".venv", "bin", "nvila")


def clean(root: Path) -> list[str]:
    """Remove what was made below `root`; returns what was left, and why. Nothing may be running (see `busy`)."""
    left = []
    for name in OURS:
        if (folder := root / name).is_symlink():
            left.append(f"{name} is a link to {folder.readlink()}: what lies there is yours to remove")
        elif folder.is_dir():
            shutil.rmtree(folder)
    if (data := root / DATA).is_symlink():
        return [*left, f"{DATA} is a link to {data.readlink()}: what lies there is yours to remove"]
    for folder in list(_demonstrations(data)):
        if as_built(folder):
            shutil.rmtree(folder)
            (folder.parent / f".{folder.name}.lock").unlink(missing_ok=True)
        else:
            left.append(f"{folder.relative_to(root)}: files were added or changed since it was built")
    for unfinished in [path for pattern in (".*.building", "*/.*.building") for path in data.glob(pattern)]:
        lock = unfinished.with_suffix(".lock")
        if lock.is_file() and not unfinished.is_symlink() and not unfinished.parent.is_symlink():
            shutil.rmtree(unfinished)
            lock.unlink()
    for folder in (*data.glob("*"), data):
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
    return left


def busy(root: Path) -> str | None:
    """What is going on below `root`: a run, a step at work in the store, or data being built; None where nothing is."""
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if CHILD in words and any(Path(os.fsdecode(word)).is_relative_to(root / "runs") for word in words if word):
            return f"a run is going on (process {process.parent.name})"
    locks = (*(root / "store").glob("*/.*.lock"), *(root / DATA).glob(".*.lock"), *(root / DATA).glob("*/.*.lock"))
    return next((f"something is at work: {lock.relative_to(root)} is locked" for lock in locks if _locked(lock)), None)


def _demonstrations(data: Path) -> Iterator[Path]:
    """Folders with a stamp, such as `data/tiny/digits`, that lie here and not behind a link."""
    for pattern in (f"*/{STAMP}", f"*/*/{STAMP}"):
        for stamp in data.glob(pattern):
            if not any(folder.is_symlink() for folder in (stamp.parent, stamp.parent.parent)):
                yield stamp.parent


def _locked(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def main(root: Path) -> int:
    """Exit code: 0, or 1 where something is running and nothing was removed."""
    if going_on := busy(root):
        print(f"nothing was removed: {going_on}", file=sys.stderr)
        return 1
    if os.access(root / COMMAND, os.X_OK):
        subprocess.run([root / COMMAND, "stop"], cwd=root, check=True)
    for line in clean(root):
        print(f"left: {ascii(line)[1:-1]}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path.cwd()))
