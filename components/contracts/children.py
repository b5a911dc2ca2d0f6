"""Child processes: none outlives the step that started it, and none takes down what only its parent has."""

import ctypes
import gc
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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


def killed_by(number: int) -> str:
    """Words for a process that a signal ended, to be said at once: memory is told as it is now."""
    import psutil

    words = f"killed by signal {signal_name(number)}"
    if number != signal.SIGKILL:
        return words
    memory = psutil.virtual_memory()
    left = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory were free right after"
    return f"{words}, often the system's out-of-memory killer; {left}"


def signal_name(number: int) -> str:
    """`9 (SIGKILL)`; some have no name."""
    name = next((f" ({known.name})" for known in signal.Signals if known == number), "")
    return f"{number}{name}"


def how_ended(code: int | None) -> str:
    """Words for an exit code as `subprocess` and `multiprocessing` have it, negative for a signal; see `killed_by`."""
    if code is None:
        return "ended"
    return f"was {killed_by(-code)}" if code < 0 else f"ended with code {code}"


def first_to_end(codes: Iterable[int | None]) -> int | None:
    """The code of the process that took others along: they were told to end, by SIGTERM."""
    ended = [code for code in codes if code]
    return next((code for code in ended if code != -signal.SIGTERM), next(iter(ended), None))


@contextmanager
def forking() -> Iterator[None]:
    """Fork in this context, and the child's garbage collector leaves the parent's objects alone.

    A process group that the parent has dropped and not yet collected would be taken down in the child, where its
    threads do not exist: that waits for ever, or aborts.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
