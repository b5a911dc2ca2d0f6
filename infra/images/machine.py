"""What building and running images takes from this machine: podman's configuration, and pip's settings."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from nvila.components.contracts.addresses import file_path, file_url
from nvila.components.contracts.environment import Environment, for_child, named
from nvila.components.contracts.errors import PreflightError

Engine = Literal["podman", "docker"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
"""For root inside a container or a machine without systemd, where podman's own defaults do not work."""
PIP_KEYS = frozenset(
    {"index-url", "extra-index-url", "no-index", "find-links", "cert", "proxy", "trusted-host", "default-timeout"}
)
PLACES = frozenset({"index-url", "extra-index-url", "find-links", "cert"})
"""The keys whose values may name files and folders of this machine."""
MOUNTED = "/run/pip"
"""Where a build sees them."""


def engine_environment(engine: Engine, scratch: Path) -> dict[str, str]:
    """Environment for what builds images. Docker needs BuildKit, which its older releases take when told.

    Raises:
        PreflightError: it is not here; nothing is installed.
    """
    if engine == "podman":
        return podman_environment(scratch)
    if shutil.which("docker") is None:
        raise PreflightError("docker is missing", where="images", do="Install docker with BuildKit, or take podman.")
    return for_child({"DOCKER_BUILDKIT": "1"})


def podman_environment(scratch: Path) -> dict[str, str]:
    """Environment for podman; `scratch` gets a configuration file where one is needed. /etc stays as it is.

    Raises:
        PreflightError: there is no podman; nothing is installed.
    """
    if shutil.which("podman") is None:
        raise PreflightError("podman is missing", where="images", do="Install the package podman.")
    if Environment.read().podman_configuration or os.getuid() != 0 or Path("/run/systemd/system").is_dir():
        return for_child()
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "containers.conf"
    path.write_text(CONFIGURATION, encoding="utf-8")
    return for_child(named(podman_configuration=path))


def pip_settings(scratch: Path) -> tuple[Path, list[str]]:
    """A pip.conf with the caller's settings, and the mounts (`SOURCE:TARGET:ro`) of what they name on this machine.

    Both are for the time of a build only: an index address may hold a password.
    """
    settings, mounts = for_a_build(_pip_config())
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / "pip.conf"
    path.touch(mode=0o600)
    path.chmod(0o600)
    lines = [f"{key} = {value}" for key, value in settings.items()]
    path.write_text("\n".join(["[global]", *lines, ""]), encoding="utf-8")
    return path, mounts


def for_a_build(settings: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The settings with paths of this machine replaced by those that a build sees, and the mounts that lead there."""
    mounts: dict[Path, str] = {}
    replaced = {}
    for key, value in settings.items():
        words = [_place(key, word, mounts) if key in PLACES else word for word in value.split()]
        replaced[key] = " ".join(words)
    return replaced, [f"{source}:{target}:ro" for source, target in mounts.items()]


def _place(key: str, word: str, mounts: dict[Path, str]) -> str:
    """One address or path. An index folder is mounted with its parent: its pages point to files beside it."""
    named = file_path(word)
    path = named or Path(word)
    if not path.exists():
        return word
    above = path.parent if key.endswith("index-url") else path
    target = mounts.setdefault(above, f"{MOUNTED}/{len(mounts)}")
    inside = Path(target, path.relative_to(above))
    return file_url(inside) if named else str(inside)


def _pip_config() -> dict[str, str]:
    """pip's own view: environment variables over configuration files."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: dict[str, dict[str, str]] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if key in PIP_KEYS and section in (":env:", "install", "global"):
            found.setdefault(key, {})[section] = str(ast.literal_eval(value))
    return {k: next(v[s] for s in (":env:", "install", "global") if s in v) for k, v in found.items()}
