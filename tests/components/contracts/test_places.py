"""What is a path on this machine and what is an address of something else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.places import is_version, local_folder, standing


@pytest.mark.parametrize("path", ["store", "/data/store", "./s3:/x", "~/store", "a:b/c", "/mnt/s3://x", "C:/x"])
def test_paths_are_paths(path: str) -> None:
    """A folder with a colon in its name is somebody's folder."""
    assert local_folder(path, "--store") == Path(path)


@pytest.mark.parametrize(
    "address", ["s3://b/x", "S3://b", " s3://b", "hf://a/b@c", "gs://b", "file:///x", Path("s3://b/x")]
)
def test_addresses_are_refused(address: str | Path) -> None:
    """pathlib takes one slash away; the address is still to be known by what is left."""
    with pytest.raises(ConfigError, match=r"^--store: not a path on this machine \(got '\w+://"):
        local_folder(address, "--store")


@pytest.mark.parametrize("variable", ["NVILA_STORE", "NVILA_RUN", "NVILA_CACHE"])
def test_variables_are_held_to_the_same(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod's variable is set by another hand than the command line."""
    monkeypatch.setenv(variable, "s3://bucket/place")
    with pytest.raises(ConfigError, match=f"{variable}: not a path"):
        Environment.read()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((name, True) for name in ("small@champion", "small/3", "nvila-8b@previous")),
        *((path, False) for path in ("./small/3", "/small/3", "refs/small/3", "weights", "./a@b", "../3")),
        *((address, False) for address in ("hf://a/b@c", "hf://a@b", "s3://b/3", "s3://3", "", "~/3")),
    ],
)
def test_a_version_of_the_registry_is_known_by_its_form(value: str, expected: bool) -> None:
    """A step in a pod must read a name as the preflight on a laptop did, whatever folders lie there."""
    assert is_version(value) is expected


@pytest.mark.skipif(os.getuid() != 0, reason="only root can take another user's place")
def test_what_a_closed_folder_holds_is_not_seen(tmp_path: Path) -> None:
    """A container's user whose home is root's got a traceback from every command: caches are looked for there."""
    closed = tmp_path / "closed"
    (closed / "cache").mkdir(parents=True)
    closed.chmod(0o700)
    process = os.fork()
    if not process:
        code = 1
        try:
            os.setuid(65534)
            # What lies above the folder is pytest's, and may be closed as well.
            code = int(standing(closed / "cache" / "new") not in (closed, *closed.parents))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
