"""How much memory this machine, or the container, still gives."""

from __future__ import annotations

from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def available_bytes() -> int:
    """What the machine or our cgroup still gives, whichever is less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    try:
        limit = int(CGROUP_LIMIT.read_text())
        return min(available, limit - int(CGROUP_USED.read_text()))
    except (OSError, ValueError):  # no cgroup v2, or its limit is "max"
        return available


def gib(size_bytes: int) -> str:
    """`1.5 GiB`."""
    return f"{size_bytes / 2**30:.1f} GiB"
