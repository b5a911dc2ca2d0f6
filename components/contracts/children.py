"""Child processes: none outlives the one that started it, even where that is killed, and none takes down what only its
parent has.

Code of ours calls `die_with_parent`. A command of others is `leashed`, and what it starts with it: this file is also
the program of the process between. It imports nothing but the standard library, so that it starts in no time.
"""

import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

_PR_SET_PDEATHSIG = 1
"""Linux prctl option: signal to this process when the thread that started it dies."""
_PR_SET_CHILD_SUBREAPER = 36
"""Linux prctl option: descendants without a parent become children of this process."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""What asks a program to stop."""
END_SECONDS = 10.0
"""How long a command that was told to end may take."""


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


def leashed(command: Sequence[str], *, heirs: str | os.PathLike[str] = "", **options: Any) -> subprocess.Popen[bytes]:
    """Start a command, in a session of its own, of which nothing is left when it ends, when this process does, even by
    SIGKILL, or when a signal tells what is returned to end: the process between the two.

    Args:
        command: program and arguments.
        heirs: a JSON file. When this process ends, the command goes on with one that the file's `guards` name by its
            id and `processes.birth`, and when that one ends, with another.
        options: of `subprocess.Popen`.
    """
    words = [sys.executable, "-IS", __file__, str(os.getpid()), os.fspath(heirs), *command]
    return subprocess.Popen(words, start_new_session=True, **options)


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
    """Fork in this context, and the child's garbage collector leaves the parent's objects alone, and so do its forks.

    A process group that the parent has dropped and not yet collected, or a frame that several threads have scaled,
    would be taken down in the child, where the threads do not exist: that waits for ever, or aborts.
    """
    inherited = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not inherited:  # else what this process was forked with would be collected here
            gc.unfreeze()


def _leash(parent: int, heirs: str, command: list[str]) -> int:
    """In the process between: the command's exit code."""
    woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker)
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda signum, frame: None)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # or their remains, which nobody else may collect, look alive
    between = os.getpid()
    child = subprocess.Popen(
        command, start_new_session=True, preexec_fn=lambda: die_with_parent(between, signal.SIGKILL)
    )
    ended = os.pidfd_open(child.pid)
    tied = os.pidfd_open(parent) if os.getppid() == parent else _heir(heirs)
    while tied is not None and select.select([woken, ended, tied], [], [])[0] == [tied]:
        os.close(tied)
        tied = _heir(heirs)
    return _end(child.pid)


def _heir(heirs: str) -> int | None:
    """A descriptor of a process that lives; None where the file names none."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        with open(heirs, "rb") as file:  # noqa: PTH123 (pathlib takes longer to import than all else here)
            guards = json.load(file)["guards"]
        for pid, born in guards:
            with suppress(OSError, IndexError):
                descriptor = os.pidfd_open(pid)
                with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
                    words = file.read().rpartition(b")")[2].split()
                if words[0] not in (b"Z", b"X") and int(words[19]) / os.sysconf("SC_CLK_TCK") == born:
                    return descriptor
                os.close(descriptor)
    return None


def _end(leader: int) -> int:
    """End what is left of a session; the exit code of its first process, as `subprocess` has it."""
    code = -signal.SIGKILL
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(leader, number)
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return code
            if process == leader:
                code = os.waitstatus_to_exitcode(status)
            elif not process:
                time.sleep(0.02)
    return code


if __name__ == "__main__":
    ended_with = _leash(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
    sys.exit(ended_with if ended_with >= 0 else 128 - ended_with)
