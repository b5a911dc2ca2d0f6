"""What a machine may withhold from the libraries in a process: short names for sockets, a home to write to, a way round
the proxy, UTF-8. Each has them from variables that are set here, once, for this process and its children."""

from __future__ import annotations

import getpass
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.places import standing

_LONGEST_BYTES = 64
"""Of the folder for temporary files. The name of a socket has 107 bytes at most; libraries put up to 40 of their own
below that folder (vLLM, multiprocessing), and some wait for ever where that is too long."""
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn whenever transformers imports torchao: of kernels that this machine cannot load and nothing asks
for, and of torchao's own use of torch."""


def settle() -> list[str]:
    """Set what is needed here; returns what to say of it, a line each. The second time there is nothing to do.

    Raises:
        ConfigError: nothing temporary can be written anywhere, or has a name that is too long for sockets.
    """
    if sys.getfilesystemencoding() != "utf-8":  # a locale of old: libraries could not even read their own files
        os.environ["PYTHONUTF8"] = "1"
    # transformers imports torchao, which asks whether there is a GPU: by CUDA itself no fork could use one any more.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    _spare_loopback()
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    return [*_room_for_sockets(), *_place_for_caches()]


def has_proxy() -> bool:
    """Whether requests to other machines go through a proxy."""
    names = {"http_proxy", "https_proxy", "all_proxy"}
    return any(value and name.lower() in names for name, value in os.environ.items())


def _spare_loopback() -> None:
    """A proxy is for other machines: what runs on this one is asked directly (MLflow, an S3, a cluster's tunnel), as
    is the API server of a pod."""
    if not has_proxy():
        return
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    spared = [host for host in given.replace(" ", "").split(",") if host]
    if "*" not in spared:
        near = (*_LOOPBACK, *filter(None, [os.environ.get("KUBERNETES_SERVICE_HOST")]))
        spared += [host for host in near if host not in spared]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(spared)


def _room_for_sockets() -> Iterator[str]:
    """Temporary files stay where the user wants them; where the folder's name does not do, a short link leads there."""
    given = os.environ.get("TMPDIR")
    if given and given != tempfile.tempdir:
        tempfile.tempdir = None  # found for another value
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigError(
            "temporary files cannot be written anywhere",
            where="TMPDIR",
            value=given,
            do="Set it to a folder that can be written.",
        ) from error
    if given and os.path.abspath(given) != folder:  # noqa: PTH100 (as `tempfile` writes it)
        yield f"TMPDIR: {given} cannot be written; temporary files lie in {folder}"
    if len(os.fsencode(folder)) > _LONGEST_BYTES or os.pathsep in folder:
        folder = tempfile.tempdir = _short_link(folder)
    if given or folder not in _SHORT:
        os.environ["TMPDIR"] = folder


def _short_link(folder: str) -> str:
    for place in _SHORT:
        link = Path(place, f"nvila-{os.getuid()}-{sha256(os.fsencode(folder)).hexdigest()[:8]}")
        try:
            if not os.path.lexists(link):
                link.symlink_to(folder)
            if link.lstat().st_uid == os.getuid() and link.readlink() == Path(folder):
                return str(link)
        except OSError:  # no such place, no links there, or another process was first
            continue
    raise ConfigError(
        f"the name has more than {_LONGEST_BYTES} bytes, or a colon, and no short link can lead there",
        where="TMPDIR",
        value=folder,
        do="Set it to a folder with a shorter name: that of a socket has 107 bytes at most.",
    )


def _place_for_caches() -> Iterator[str]:
    """Where the home cannot be written, or is none, what libraries keep there lies among the temporary files."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a number that no account has, as in pods
        os.environ["LOGNAME"] = str(os.getuid())
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    wanted = Path(os.environ.get("XDG_CACHE_HOME") or (home or Path()) / ".cache")
    if home and _can_be_written(wanted):
        return
    caches = own_folder("caches")
    os.environ["XDG_CACHE_HOME"] = str(caches)
    if home is None:
        os.environ["HOME"] = str(caches)
    else:  # to be read there all the same
        os.environ.setdefault("HF_TOKEN_PATH", str(wanted / "huggingface" / "token"))
    for variable, folder in _NOT_BELOW_XDG.items():
        os.environ.setdefault(variable, str(caches / folder))
    yield f"{wanted} cannot be written; what libraries keep there lies in {caches}"


_NOT_BELOW_XDG = {
    "MPLCONFIGDIR": "matplotlib",
    "TRITON_HOME": "",
    "VLLM_CONFIG_ROOT": "vllm",
    "FLASHINFER_WORKSPACE_BASE": "",
    "CUDA_CACHE_PATH": "cuda",
}
"""Variables of libraries that keep things in the home, and a folder for each."""


def _can_be_written(folder: Path) -> bool:
    there = standing(folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def own_folder(name: str) -> Path:
    """A folder among the temporary files for all processes of this user; a new one where somebody took its name."""
    folder = Path(tempfile.gettempdir(), f"nvila-{os.getuid()}-{name}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix=f"nvila-{name}-"))
