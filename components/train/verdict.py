"""Why a training job failed: the first process to fail says so in one file, and all others end by it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

from nvila.components.contracts.errors import NvilaError, from_record, to_record
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import write_atomic
from nvila.components.tracking.redact import tell

VERDICT = "verdict.json"
LOOK_SECONDS = 0.5
GRACE_SECONDS = 3.0
"""How long a process may take, once another has failed, to end in its own way."""


def stamp(out: Path) -> int | None:
    """When the verdict of a job was given; None where there is none."""
    try:
        return (out / VERDICT).stat().st_mtime_ns
    except OSError:
        return None


def give(out: Path, error: NvilaError, stale: int | None = None) -> None:
    """Write why the job failed, unless another process has: the first knows, the others only lost it.

    `stale` is the stamp of an earlier attempt's verdict, which does not count.
    """
    with suppress(OSError):  # the disk is full, or gone: that is in the log
        if stamp(out) in (None, stale):
            write_atomic(out / VERDICT, json.dumps(to_record(error)))


def read(out: Path, stale: int | None) -> NvilaError | None:
    """The verdict on this attempt, where one was given; a further node may still find an earlier attempt's."""
    if stamp(out) in (None, stale):
        return None
    return from_record(json.loads((out / VERDICT).read_text(encoding="utf-8")))


def obey(out: Path) -> None:
    """From now on end this process soon after the job has a verdict, whatever it waits for.

    A collective hears no signal, and on GPUs not at once that a peer is gone: torch's limit is half an hour.
    """
    stale = stamp(out)

    def look() -> None:
        while stamp(out) in (None, stale):
            time.sleep(LOOK_SECONDS)
        time.sleep(GRACE_SECONDS)
        os._exit(int(Exit.FAULT))

    threading.Thread(target=look, daemon=True).start()


def named(caught: BaseException, out: Path) -> NvilaError:
    """An error that is none of ours as one, in its own words and with the room on the disk, which torch's do not tell;
    its traceback goes to the log."""
    if isinstance(caught, NvilaError):
        return caught
    print(tell("".join(traceback.format_exception(caught))), file=sys.stderr, flush=True)
    left = None
    with suppress(OSError):
        left = f"The disk had {shutil.disk_usage(out).free >> 20} MiB left"
    return NvilaError(f"{type(caught).__name__}: {caught}", where=str(out), do=left)
