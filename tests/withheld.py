"""The system refuses some calls to this process and all that it starts, as a file system that lacks something does.

`python withheld.py locks=ENOLCK,links=EPERM COMMAND...` runs a command so. A filter of the kernel (seccomp) does it: C
libraries meet it too.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Mapping

_LOAD, _EQUALS, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_SECCOMP, _NO_NEW_PRIVILEGES, _FILTER = 22, 38, 2
_CALLS = {"locks": (73,), "links": (88, 266)}
"""On x86-64: flock; symlink, symlinkat. Hard links stay: the C library makes its semaphores with them, in memory."""
_FCNTL, _FCNTL_LOCKS = 72, (6, 7, 37, 38)
"""F_SETLK, F_SETLKW and the same of open files, which SQLite asks for."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def withhold(what: Mapping[str, int]) -> None:
    """Answer the calls of each kind with its error from now on; there is no way back."""
    allow, program = _op(_RETURN, _ALLOW), [_op(_LOAD, 0)]
    for kind, error in what.items():
        for number in _CALLS[kind]:
            program += [_op(_EQUALS, number, 0, 1), _op(_RETURN, _ERROR | error)]
    if "locks" in what:
        program += [_op(_EQUALS, _FCNTL, 1, 0), allow, _op(_LOAD, 24)]  # its second argument
        for command in _FCNTL_LOCKS:
            program += [_op(_EQUALS, command, 0, 1), _op(_RETURN, _ERROR | what["locks"])]
    program.append(allow)
    libc = ctypes.CDLL(None, use_errno=True)
    filled = _Program(len(program), b"".join(program))
    for arguments in ((_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SECCOMP, _FILTER, ctypes.byref(filled), 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "no filter of system calls")


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


if __name__ == "__main__":
    kinds = dict(word.split("=") for word in sys.argv[1].split(","))
    withhold({kind: getattr(errno, name) for kind, name in kinds.items()})
    os.execvp(sys.argv[2], sys.argv[2:])
