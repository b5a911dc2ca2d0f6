"""Whether preflight tells a volume whose locks hold from one on which two runs would work in one folder."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from nvila.components.preflight.locking import problems


def _mount(folder: Path, kind: str, options: str) -> Path:
    """The kernel's list, with a mount at a folder below another one."""
    place = str(folder).replace(" ", "\\040")
    lines = (
        "22 1 254:0 / / rw,relatime - ext4 /dev/vda rw",
        f"40 22 0:50 / {place} rw,relatime shared:3 - {kind} server:/x rw,{options}",
    )
    path = folder / "mountinfo"
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("nfs4", "vers=4.2,local_lock=none", ""),
        ("nfs4", "vers=4.0,local_lock=all", "nfs4 mounted with local_lock=all"),
        ("nfs", "vers=3,nolock,local_lock=all", "nfs mounted with nolock"),
        ("nfs", "vers=3,local_lock=posix", ""),
        ("ceph", "name=admin", ""),
        ("lustre", "flock,lazystatfs", ""),
        ("lustre", "localflock", "localflock"),
        ("cifs", "nobrl", "nobrl"),
        ("virtiofs", "", "is virtiofs, where each node"),
        ("fuse.gcsfuse", "user_id=0", "gcsfuse"),
        ("fuse.juicefs", "user_id=0", ""),
    ],
)
def test_a_mount_whose_locks_stay_on_a_node_is_refused(tmp_path: Path, kind: str, options: str, says: str) -> None:
    """Cancelling one of two runs with the same work ended the other's job, and nothing had said so before."""
    folder = tmp_path / "my volume"
    folder.mkdir()
    found = problems(folder / "store" / "not there yet", _mount(folder, kind, options))
    assert bool(found) == bool(says) and says in "".join(found)


def test_the_disk_of_this_machine_has_locks(tmp_path: Path) -> None:
    """A check that is never content would stop every run."""
    assert problems(tmp_path / "store") == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a laptop others stand in for them; between pods nothing does."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    assert "Function not implemented" in problems(tmp_path)[0]


def test_a_lock_that_only_its_process_sees_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems say yes to every lock."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert "another process does not see one" in problems(tmp_path)[0]
