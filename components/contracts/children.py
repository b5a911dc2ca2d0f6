"""Child processes: none outlives the step that started it."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
"""Linux prctl option: signal to this process when the thread that started it dies."""


def die_with_parent(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send a signal to this process when its parent dies, even by SIGKILL: no orphan works on.

    To be called in the child, first thing.

    Args:
        parent: process id of the parent, which may have died before this call.
        number: the signal; SIGKILL for a process that outlasts SIGTERM.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
