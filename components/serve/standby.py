"""Stands by for the supervisor and becomes one where that is killed. It imports next to nothing, so it is small."""

import contextlib
import os
import select
import signal
import sys


def main(supervisor: int, runs: str) -> None:
    """Wait for the supervisor's end; told to end itself, it does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with contextlib.suppress(ProcessLookupError):  # it has ended by now
        select.select([os.pidfd_open(supervisor)], [], [])
    os.execv(sys.executable, [sys.executable, "-m", "nvila.components.serve.supervisor", runs])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
