"""A base image made on this machine, where none can be pulled: Debian with Python 3.11, by debootstrap.

`python -m nvila.infra.images.debian` makes `localhost/nvila/debian:bookworm` unless it is there, and prints its name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nvila.components.contracts.errors import NvilaError, PreflightError
from nvila.infra.images.build import SCRATCH
from nvila.infra.images.machine import podman_environment

IMAGE = "localhost/nvila/debian:bookworm"
PACKAGES = ("ca-certificates", "libnuma1", "python3", "python3-venv")


def make() -> str:
    """Name of the image, which is there afterwards.

    Raises:
        PreflightError: something is missing on this machine; nothing is installed on it.
        NvilaError: debootstrap or podman failed.
    """
    environment = podman_environment(SCRATCH)
    if subprocess.run(["podman", "image", "exists", IMAGE], env=environment).returncode == 0:
        return IMAGE
    if shutil.which("debootstrap") is None:
        do = "Install the package debootstrap, or give BASE_IMAGE."
        raise PreflightError("debootstrap is missing", where="make images", do=do)
    if os.getuid() != 0:
        raise PreflightError("debootstrap must run as root", where="make images", do="Give BASE_IMAGE instead.")
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        root, archive = str(Path(folder, "root")), str(Path(folder, "root.tar"))
        _run(["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", "bookworm", root], environment)
        downloaded = ["--exclude=./var/cache/apt/archives/*.deb", "--exclude=./var/lib/apt/lists/*"]
        _run(["tar", "--create", "--one-file-system", *downloaded, "-C", root, "--file", archive, "."], environment)
        _run(["podman", "import", "--quiet", archive, IMAGE], environment)
    return IMAGE


def _run(command: list[str], environment: dict[str, str]) -> None:
    """Run a program; what it prints goes to standard error."""
    if subprocess.run(command, env=environment, stdout=sys.stderr).returncode:
        raise NvilaError(f"{command[0]} failed", where=" ".join(command), do="It says above why.")


if __name__ == "__main__":
    try:
        print(make())
    except NvilaError as error:
        print(error, file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None
