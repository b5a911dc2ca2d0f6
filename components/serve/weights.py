"""Brings the files of a registered version to a node's cache, before its pod serves them: whole and verified, or not at
all. It is the program of a serving pod's init container.

    python -m nvila.components.serve.weights --model M --version N --digest D --into FOLDER

`FOLDER/D/` then holds `manifest.json` and `model/`. D is the digest of the manifest as the registry has it, so nothing
that is there needs to be believed: a file is hashed, and fetched only where its bytes are others. It is put together
beside, an earlier try that was ended is gone on with, and it gets its name last.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nvila.components.contracts.digests import is_sha256
from nvila.components.contracts.environment import Environment, entered
from nvila.components.contracts.errors import ConfigError, DamagedError, DataError, NvilaError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.files import discard, sync_tree
from nvila.components.contracts.locks import WORK_SECONDS, alone
from nvila.components.contracts.manifest import MANIFEST, File, Manifest, faults_of
from nvila.components.contracts.memory import gib
from nvila.components.contracts.progress import Progress
from nvila.components.contracts.text import say
from nvila.components.data.remote.artifacts import MIB, Artifacts, Tell, of_version

MODEL = "model"
"""The folder of a version that is served."""
_AGAIN = "Register the model again; a pod that tries again will find the same."
_TRIES = 2
"""For a file whose bytes are wrong: once they may have been spoilt on the way."""


def bring(model: str, version: str, digest: str, into: Path, here: Environment) -> Path:
    """The folder of the version's files, which are those that its manifest names.

    Args:
        model: registered name.
        version: its number.
        digest: of its manifest.
        into: the cache.
        here: names MLflow and the credentials for it and its stores.

    Raises:
        ConfigError: the digest is none, or MLflow cannot be asked.
        DataError: the version, or its manifest, is not there.
        DamagedError: what is registered are other files than its manifest says, or it is another manifest.
        Unreachable: MLflow or the store does not answer.
        NvilaError: the cache takes nothing more.
    """
    if not is_sha256(digest):
        raise ConfigError("not the digest of a manifest", where="--digest", value=digest)
    folder, scratch = into / digest, into / f".{digest}.partial"
    try:
        into.mkdir(parents=True, exist_ok=True)
        what = f"{model} version {version}"
        with alone(into / f".{digest}.lock", f"{what}: another pod of this node fetches it", WORK_SECONDS):
            # One that is there may be served now: a file is replaced by rename, and no other is touched.
            home = folder if folder.is_dir() else scratch
            _fill(home, what, digest, lambda: of_version(model, version, here))
            if home is scratch:
                sync_tree(scratch)
                scratch.rename(folder)
    except OSError as error:
        raise NvilaError(
            f"the cache cannot be written: {error.strerror or error}",
            where=str(error.filename or into),
            do="Give the claim more room, or remove versions that nothing serves; what was fetched is kept.",
        ) from error
    return folder


def _fill(home: Path, what: str, digest: str, open_source: Callable[[], Artifacts]) -> None:
    """Have in a folder the manifest, the files of the model, and nothing else in its place."""
    manifest, source = _known(home, digest), None
    if manifest is None:
        source = open_source()
        manifest = _manifest(home, source, digest)
    files = {name: file for name, file in manifest.files.items() if file.uri.startswith(f"{MODEL}/")}
    if not files:
        raise DataError("the manifest names no files of a model", where=what, do="Register the model again.")
    say(f"{what}: reading what is there of {gib(sum(file.size_bytes for file in files.values()))}")
    missing = faults_of(home, files, deep=True, fresh=True)
    for stranger in manifest.strangers(MODEL):
        discard(stranger)
    if missing:
        _require_room(home, [files[name] for name in missing])
        source = source or open_source()
        progress = _in_mib(f"{what} from {source.where}, MiB", sum(files[name].size_bytes for name in missing))
        for name in missing:
            _fetch(home, files[name], source, progress)
    say(f"{what}: {len(files)} files are there and verified, {len(missing)} of them fetched")


def _known(home: Path, digest: str) -> Manifest | None:
    """The manifest that is there, if it is the one that is wanted."""
    try:
        found = Manifest.load(home / MANIFEST)
    except NvilaError:
        return None
    return found if found.digest == digest else None


def _manifest(home: Path, source: Artifacts, digest: str) -> Manifest:
    home.mkdir(parents=True, exist_ok=True)
    partial = home / f".{MANIFEST}"
    for tried in range(1, _TRIES + 1):
        partial.unlink(missing_ok=True)
        source.fetch(MANIFEST, partial, lambda size: None)
        try:
            found = Manifest.load(partial)
            if found.digest != digest:
                raise DamagedError("another manifest", value={"wanted": digest[:12], "there": found.digest[:12]})
            break
        except DamagedError as error:
            if tried == _TRIES:
                raise DamagedError(
                    f"this is not what was registered: {error.what}",
                    where=f"{source.where}/{MANIFEST}",
                    value=error.value,
                    do=_AGAIN,
                ) from error
    partial.replace(home / MANIFEST)
    return Manifest.load(home / MANIFEST)


def _fetch(home: Path, file: File, source: Artifacts, progress: Tell) -> None:
    """Have one file at its place."""
    target, partial = home / file.uri, _partial(home, file)
    for _ in range(_TRIES):
        digest = source.fetch(file.uri, partial, progress)
        if digest == file.sha256:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                discard(target)
            partial.replace(target)
            return
        partial.unlink()
    raise DamagedError(
        "these are not the bytes that were registered",
        where=f"{source.where}/{file.uri}",
        value={"wanted": file.sha256[:12], "there": digest[:12]},
        do=_AGAIN,
    )


def _partial(home: Path, file: File) -> Path:
    return home / f".{file.sha256}.partial"


def _require_room(home: Path, missing: Sequence[File]) -> None:
    """Raises:
    NvilaError: the disk does not hold them.
    """
    partials = [path for file in missing if (path := _partial(home, file)).exists()]
    needed = sum(file.size_bytes for file in missing) - sum(path.stat().st_size for path in partials)
    if (free := shutil.disk_usage(home).free) < needed:
        raise NvilaError(
            f"the cache has no room: {gib(needed)} are still to come, {gib(free)} are free",
            where=str(home.parent),
            do="Give the claim more room, or remove versions that nothing serves.",
        )


def _in_mib(what: str, size_bytes: int) -> Tell:
    """Progress in MiB of what comes in bytes."""
    progress, came = Progress(what, -(-size_bytes // MIB)), [0]

    def tell(more_bytes: int) -> None:
        came[0] += more_bytes
        progress.update(came[0] // MIB - progress.done)

    return tell


def main(words: Sequence[str] | None = None) -> int:
    """The program; its last line says what is in the way, where something is.

    Returns:
        The exit code of the error's family; `REJECTED` where no further try can make the files right.
    """
    parser = argparse.ArgumentParser(prog="nvila-weights", description=__doc__)
    for name in ("model", "version", "digest"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--into", required=True, type=Path)
    given = parser.parse_args(words)
    try:
        with entered(here := Environment.read()):
            bring(given.model, given.version, given.digest, given.into, here)
    except NvilaError as error:
        say(" ".join(str(error).split()))
        return Exit.REJECTED if isinstance(error, DamagedError) else error.exit_code
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
