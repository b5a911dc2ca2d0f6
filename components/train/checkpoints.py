"""The checkpoints of an unfinished stage: which are kept, and which are sound. Writing and loading is `keeper`'s.

`step-N/` is there only whole: written under another name, brought to the disk with a record of its files, renamed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nvila.components.contracts.files import discard, read_json, sync, write_atomic
from nvila.components.contracts.sealed import fault
from nvila.components.contracts.text import say

LATEST, BEST = "latest", "best"
"""Files that name the newest checkpoint and the one before which the loss was lowest, for people and for DeepSpeed's
own tools. A resume looks at the checkpoints themselves."""
RECORD = "files.json"
"""In each checkpoint: sizes and digests of its files."""
ABOUT = "checkpoint.json"
"""In each checkpoint: its `step`, the `world` and `zero` that its files are divided for, the mean `loss` of the steps
since the checkpoint before, and the digest of the model that the stage began with (`base`)."""
UNIVERSAL = "universal"
"""Folder that a resume makes for itself, where the processes are others than those that saved."""
_WHOLE = re.compile(r"step-(\d+)")


def partial(step: int | str) -> str:
    """Name of a checkpoint while it is written."""
    return f"partial-step-{step}"


def publish(folder: Path, step: int, keep: int, keep_best: bool) -> None:
    """Give a checkpoint that is on the disk its name, then drop all but the newest `keep` and, if wanted, the best."""
    whole = folder / f"step-{step}"
    discard(whole)
    (folder / partial(step)).rename(whole)
    sync(folder)
    write_atomic(folder / LATEST, whole.name)
    known = _by_step(folder)
    kept = known[:keep]
    if keep_best and (best := _best(known)):
        write_atomic(folder / BEST, best.name)
        kept.append(best)
    for old in known:
        if old not in kept:
            discard(old)


def clear(folder: Path) -> None:
    """Remove what a save, or a resume, that failed or was cut off has left."""
    for cut_off in (*folder.glob(partial("*")), folder / UNIVERSAL):
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
    known = _by_step(folder)
    for path in known:
        if (why := fault(path, path / RECORD)) is None:
            lost = _step(known[0]) - _step(path)
            again = f", {lost} step{'s' if lost > 1 else ''} before the newest" if lost else ""
            _say(f"goes on from checkpoint {path.name}{again}", broken)
            return path.name
        broken.append(f"{path.name} is not sound: {why}")
        discard(path)
    if broken:
        _say("no checkpoint is left, training starts anew", broken)
    return None


def outlook(folder: Path) -> str:
    """What another attempt will do, in one sentence."""
    if known := _by_step(folder):
        return f"Run again and it goes on from checkpoint {known[0].name}."
    return "No checkpoint was written yet: run again and the stage begins anew."


@contextmanager
def plainly_named(folder: Path) -> Iterator[str]:
    """A path of the folder without `[`, `*` or `?`: DeepSpeed looks for its files by patterns."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{opened}"
    finally:
        os.close(opened)


def _best(known: Iterable[Path]) -> Path | None:
    """Of some checkpoints the one with the lowest loss."""
    losses = {path: read_json(path / ABOUT).get("loss") for path in known}
    told = {path: loss for path, loss in losses.items() if isinstance(loss, int | float)}
    return min(told, key=lambda path: (told[path], -_step(path)), default=None)


def _by_step(folder: Path) -> list[Path]:
    """Checkpoints that have their name, the newest first."""
    return sorted((path for path in folder.glob("step-*") if _WHOLE.fullmatch(path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _say(what: str, broken: list[str]) -> None:
    say(what + (f" ({'; '.join(broken)})" if broken else ""))
