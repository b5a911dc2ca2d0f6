"""Two pods at one folder: a lock that one holds is seen by the other, or is not. `helm test` asks so of the volume.

    python -m nvila.infra.checks.locks FOLDER TEST

Both run this program with one name of the test. Each leaves its name in the folder; the first of the names holds the
lock, the other looks and says what it saw. On two nodes this is what no pod can find out by itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from nvila.components.contracts.errors import NvilaError, PreflightError, Unreachable
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.files import read_json, write_atomic
from nvila.components.contracts.locks import alone, is_held
from nvila.components.contracts.text import say
from nvila.components.preflight.locking import APART

MEET_SECONDS = 240.0
"""How long one waits for the other, whose image may have to be fetched."""
T = TypeVar("T")


def meet(folder: Path, name: str, node: str) -> str:
    """Play one of the two parts; returns what was found.

    Args:
        folder: on the volume, of this test alone.
        name: of this pod.
        node: that it is on.

    Raises:
        PreflightError: the lock was not seen.
        Unreachable: the other pod did not come, or went.
    """
    mine, lock, held, seen = (folder / part for part in (f"{name}.here", "lock", "held", "seen"))
    write_atomic(mine, json.dumps({"node": node}))
    try:
        here = _wait(lambda: sorted(folder.glob("*.here")), lambda found: len(found) > 1, "another pod to lock against")
        where = " and ".join(dict.fromkeys(str(read_json(path).get("node")) for path in here))
        if name == here[0].stem:
            with alone(lock, "the lock of this test"):
                write_atomic(held, "{}")
                found = _wait(lambda: read_json(seen), bool, "the other pod to look")
        else:
            _wait(held.is_file, bool, "the other pod to lock")
            found = {"held": is_held(lock)}
            write_atomic(seen, json.dumps(found))
    except Unreachable:
        mine.unlink(missing_ok=True)
        raise
    if name == here[0].stem:  # the other has nothing more to read
        shutil.rmtree(folder)
    if not found["held"]:
        raise PreflightError(f"a lock that a pod held was not seen by another ({where})", where=str(folder), do=APART)
    return f"a lock is seen by another pod: {where}" + ("" if " and " in where else ", the only node that was tried")


def _wait(look: Callable[[], T], enough: Callable[[T], bool], what: str) -> T:
    deadline = time.monotonic() + MEET_SECONDS
    while not enough(found := look()):
        if time.monotonic() > deadline:
            raise Unreachable(f"waited {MEET_SECONDS:.0f} s for {what}")
        time.sleep(0.2)
    return found


def main(words: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="nvila-test-locks", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("test", help="a name that both pods are given, and no other test")
    parser.add_argument("--node", default="this machine")
    given = parser.parse_args(words)
    folder = given.folder / f".locks-{given.test}"
    try:
        say(f"[ok] {given.folder}: {meet(folder, socket.gethostname(), given.node)}")
    except NvilaError as error:
        say(f"[failed] {' '.join(str(error).split())}")
        return error.exit_code
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
