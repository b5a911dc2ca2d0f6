"""The checkpoints of an unfinished stage: which are kept, and which are sound. Writing and loading is DeepSpeed's.

`step-N/` is there only whole: written under another name, brought to the disk with a record of its files, renamed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nvila.components.contracts.files import discard, sync, write_atomic
from nvila.components.contracts.sealed import fault
from nvila.components.contracts.text import say

LATEST = "latest"
"""File that names the newest checkpoint, for DeepSpeed's own tools. A resume looks at the checkpoints themselves."""
RECORD = "files.json"
"""In each checkpoint: sizes and digests of its files."""
KEPT = 2
_WHOLE = re.compile(r"step-(\d+)")
_OWNER = re.compile(r"zero_pp_rank_(\d+)_")


def partial(step: int | str) -> str:
    """Name of a checkpoint while it is written."""
    return f"partial-step-{step}"


def written_by(folder: Path, rank: int) -> list[str]:
    """Names of a checkpoint's files that this process has written; what belongs to no process is rank 0's."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    owners = [_OWNER.search(name) for name in names]
    return [name for name, owner in zip(names, owners, strict=True) if (int(owner[1]) if owner else 0) == rank]


def publish(folder: Path, step: int) -> None:
    """Give a checkpoint that is on the disk its name, then drop all but the newest."""
    whole = folder / f"step-{step}"
    discard(whole)
    (folder / partial(step)).rename(whole)
    sync(folder)
    write_atomic(folder / LATEST, whole.name)
    newest = _by_step(folder)
    for old in [path for path in folder.iterdir() if path.is_dir() and path not in newest[:KEPT]]:
        discard(old)


def clear(folder: Path) -> None:
    """Remove what a save that failed or was cut off has left."""
    for cut_off in folder.glob(partial("*")):
        discard(cut_off)


def bring_back(checkpoint: Path | None, logs: Iterable[Path]) -> None:
    """Make logs what they were at a checkpoint, or empty where there is none."""
    for log in logs:
        discard(log)
        write_atomic(log, "" if checkpoint is None else (checkpoint / log.name).read_text(encoding="utf-8"))


def probably_at(folder: Path) -> int:
    """Step of the newest checkpoint, sound or not; 0 where there is none."""
    return max((int(path.name.removeprefix("step-")) for path in _by_step(folder)), default=0)


def newest_sound(folder: Path) -> str | None:
    """Name of the newest checkpoint whose files are as they were written; says where the work goes on, and why there.

    What is not sound, or was cut off, is removed: it would stand in the way of those to come, and fill the disk.
    """
    clear(folder)
    broken: list[str] = []
    for path in _by_step(folder):
        if (why := fault(path, path / RECORD)) is None:
            _say(f"goes on from checkpoint {path.name}", broken)
            return path.name
        broken.append(f"{path.name} is not sound: {why}")
        discard(path)
    if broken:
        _say("no checkpoint is left, training starts anew", broken)
    return None


def _by_step(folder: Path) -> list[Path]:
    """Checkpoints that have their name, the newest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _WHOLE.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: -int(pair[0][1]))]


def _say(what: str, broken: list[str]) -> None:
    say(what + (f" ({'; '.join(broken)})" if broken else ""))
