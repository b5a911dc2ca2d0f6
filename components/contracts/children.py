"""Child processes: none outlives the step that started it."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1
"""Linux prctl option: signal to this process when the thread that started it dies."""


def die_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent dies, even by SIGKILL: no orphan works on.

    To be called in the child, first thing.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
