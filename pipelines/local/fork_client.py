"""What KFP's local runner takes for its Python: hands a task to the process of `forks`, and ends as the task does.

Started once a task, with nothing but the standard library.
"""

import json
import os
import socket
import sys
from contextlib import suppress

SOCKET = "socket"
"""In the client's folder: where the process that forks listens."""


def main(folder: str, arguments: list[str]) -> int:
    """Exit code of the task."""
    environment = dict(os.environ)  # noqa: TID251 (contracts.environment takes longer to import than this to run)
    environment["PATH"] = environment["PATH"].removeprefix(folder + os.pathsep)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address(folder))
        server.sendall(json.dumps({"arguments": arguments, "environment": environment}).encode())
        server.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: server.recv(64), b""))
    if not answer:
        raise SystemExit("the process that runs the steps is gone")
    _tidy(arguments)
    code = int(answer)
    return code if code >= 0 else 128 - code


def address(folder: str) -> str:
    """The socket in the folder, however long its path is: an address has 107 bytes. For the process that asks only."""
    return f"/proc/self/fd/{os.open(folder, os.O_PATH)}/{SOCKET}"


def _tidy(arguments: list[str]) -> None:
    """Remove the file that KFP's command wrote for the task, and its folder: it leaves them behind."""
    script = arguments[arguments.index("--component_module_path") + 1]
    with suppress(OSError):
        os.unlink(script)  # noqa: PTH108 (pathlib takes as long to import as all of this to run)
        os.rmdir(script.rpartition("/")[0])  # noqa: PTH106


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
