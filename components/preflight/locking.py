"""Whether a lock in a folder holds: between processes, which is tried, and between nodes, as far as a mount tells.

Two runs with the same work wait for each other by a lock in the store. Where nodes do not see each other's, both work
in one folder and on one job, and cancelling one of the runs ends the other's.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from nvila.components.contracts.places import standing

APART = (
    "Use a volume whose locks hold on all nodes: NFS 4 (or 3 without `nolock` and `local_lock`), CephFS, Lustre with "
    "`flock`, GPFS, GlusterFS or JuiceFS."
)
_ONE_NODE = {
    "9p": "",
    "virtiofs": "",
    "cifs": r"\bnobrl\b",
    "smb3": r"\bnobrl\b",
    "lustre": r"\blocalflock\b",
    "nfs": r"\bnolock\b|\blocal_lock=(all|flock)\b",
    "nfs4": r"\blocal_lock=(all|flock)\b",
    **dict.fromkeys(
        ("fuse.blobfuse2", "fuse.gcsfuse", "fuse.geesefs", "fuse.goofys", "fuse.mountpoint-s3", "fuse.rclone"), ""
    ),
    "fuse.s3fs": "",
}
"""File systems whose locks each node keeps to itself, where an option in the mount's line says so; empty: always."""
_LOOK = (
    "import fcntl, sys\nfile = open(sys.argv[1], 'r+')\ntry: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    "except BlockingIOError: sys.exit(3)"
)
_SEEN = 3
"""Exit code of that program where the lock was held."""


def problems(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> list[str]:
    """Why locks below a folder, which need not be there yet, do not hold on a cluster; a line.

    Args:
        folder: the store.
        mounts: the kernel's list, as proc(5) describes it.
    """
    import fcntl

    there = standing(folder).resolve()
    why = _of_mount(there, mounts)
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".lock-") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            seen = subprocess.run([sys.executable, "-c", _LOOK, file.name], capture_output=True).returncode == _SEEN
            why = why if seen else "another process does not see one"
    except OSError as error:
        why = error.strerror or str(error)
    return [f"{there}: locks do not hold there ({why}), and two runs would work in one folder. {APART}"] if why else []


def _of_mount(folder: Path, mounts: Path) -> str:
    """What the mount that a folder lies in says against its locks."""
    found = ("", "", "")
    for line in mounts.read_text().splitlines():
        before, _, after = line.partition(" - ")
        place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        kind, _, options = after.partition(" ")
        if folder.is_relative_to(place) and len(place) >= len(found[0]):
            found = (place, kind, f"{before.split()[5]},{options.rpartition(' ')[2]}")
    place, kind, options = found
    if kind not in _ONE_NODE or not (said := re.search(_ONE_NODE[kind], options)):
        return ""
    return f"{place} is {kind}{f' mounted with {said[0]}' if said[0] else ''}, where each node has its own"
