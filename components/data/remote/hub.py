"""Weights on the Hugging Face hub: the commit that a revision means now, and the files of it in the hub's own cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nvila.components.contracts.environment import current
from nvila.components.contracts.errors import ConfigError, DataError, Unreachable
from nvila.components.contracts.manifest import sha256_file, write_atomic
from nvila.components.contracts.progress import waiting_for
from nvila.components.data.remote import insist as limits
from nvila.components.data.remote import received
from nvila.components.data.remote.cache import cache, unwritable
from nvila.components.data.remote.insist import insist, said
from nvila.components.data.remote.received import Received
from nvila.components.data.remote.wanted import WANTED

T = TypeVar("T")


class _Damaged(Exception):
    """A file of the cache is not what its name says."""


def identity(name: str) -> dict[str, str]:
    """The commit that `owner/name@revision` is: itself where it is one, else as the hub says.

    Where the hub does not say (`HF_HUB_OFFLINE`, it does not answer, it refuses) it is the one that the cache has,
    which is told in a line.

    Raises:
        ConfigError: not a name on the hub.
        DataError: the cache knows nothing, and the hub refuses or is not to be asked.
        Unreachable: the cache knows nothing, and the hub does not answer.
    """
    return {"commit": _commit(name)[0]}


def fetch(name: str, patterns: Sequence[str] = WANTED) -> tuple[Path, dict[str, str]]:
    """The folder of the files of these patterns, and the commit that they are of. Locks and partial files are the
    client's own.

    Raises:
        ConfigError, DataError, Unreachable: as `identity`.
        NvilaError: the cache cannot be written.
    """
    from huggingface_hub import snapshot_download

    repository, revision = _split(name)
    commit, online = _commit(name)
    options: dict[str, Any] = {"cache_dir": _cache_dir(), "allow_patterns": list(patterns)}

    def bring() -> Path:
        # By the commit: the name may have become another one since. So the cache is told what the name is.
        folder = _whole(Path(snapshot_download(repository, revision=commit, **options)))
        if revision != commit:
            write_atomic(folder.parents[1] / "refs" / (revision or "main"), commit)
        return folder

    def stored() -> Path:
        return _whole(Path(snapshot_download(repository, revision=commit, **options, local_files_only=True)))

    folder = _from_hub(bring, stored, f"hf://{name}")[0] if online else _explained(stored, f"hf://{name}")
    return folder, {"commit": commit}


def _commit(name: str) -> tuple[str, bool]:
    """The commit, and whether the hub answers."""
    from huggingface_hub import HfApi

    repository, revision = _split(name)
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision, True

    def ask() -> str:
        return str(HfApi().repo_info(repository, revision=revision).sha)

    def noted() -> str:
        known = HfApi().resolve_revision(repository, revision=revision, cache_dir=_cache_dir(), local_files_only=True)
        return known.resolved

    return _from_hub(ask, noted, f"hf://{name}")


def _from_hub(ask: Callable[[], T], stored: Callable[[], T], uri: str) -> tuple[T, bool]:
    """What the hub says, else what the cache has, and whether it was the hub."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import RevisionResolutionError

    hooks = (client := get_session()).event_hooks
    if _limited not in hooks["request"]:
        client.event_hooks = hooks | {"request": [*hooks["request"], _limited]}
    try:
        return _explained(lambda: insist(ask, _passes, uri), uri), True
    except (DataError, Unreachable) as error:
        try:
            found = stored()
        except (OSError, _Damaged, RevisionResolutionError):
            raise error from None
        waiting_for(f"{uri}: taken from the cache as it is; {said(error.__cause__ or error)}")
        return found, False


def _limited(request: Any) -> None:
    """Give a request of the hub's client a limit where it has none: most of them would wait for ever."""
    given = request.extensions.get("timeout", {})
    default = dict.fromkeys(("read", "write", "pool"), limits.READ_SECONDS) | {"connect": limits.CONNECT_SECONDS}
    request.extensions["timeout"] = default | {name: value for name, value in given.items() if value is not None}


def _explained(attempt: Callable[[], T], uri: str) -> T:
    """What `attempt` returns; an error of the client becomes one of ours."""
    import httpx
    from huggingface_hub.errors import HFValidationError, RevisionResolutionError

    try:
        return attempt()
    except HFValidationError as error:
        raise ConfigError("not a name on the hub", where=uri, do="Write hf://owner/name@revision.") from error
    except (OSError, httpx.HTTPError, httpx.InvalidURL, _Damaged, RevisionResolutionError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise unwritable(error, cache()) from error
        raise DataError(
            "the weights cannot be downloaded from the hub and are not in its cache",
            where=uri,
            value=said(error),
            do="Check the name, HF_TOKEN and the network, or name a local folder.",
        ) from error


def _passes(error: Exception) -> bool:
    """Whether the hub may answer the next time: it is overloaded or away, or a connection broke."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    seen: BaseException | None = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if status is not None:
            return bool(status >= 500 or status in (408, 425, 429))
        if isinstance(seen, OfflineModeIsEnabled) or "CERTIFICATE_VERIFY_FAILED" in str(seen):
            return False
        if isinstance(seen, httpx.TransportError | _Damaged | RuntimeError | ConnectionError | TimeoutError):
            return True  # RuntimeError: how the transfer library hf_xet reports the network
        if "Consistency check failed" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _whole(folder: Path) -> Path:
    """The folder, unless a file that is called by its SHA-256 has another one; that is removed, to be fetched anew.

    The client compares sizes only. What was read once is noted beside the cache and not read again until it changes.
    """
    book = cache() / "verified" / f"hub-{folder.name}-{folder.parents[1].name}.json"
    known, seen, damaged = received.read(book), {}, []
    for path in sorted(folder.rglob("*")):
        blob = path.resolve()
        if not path.is_symlink() or not blob.is_file() or not re.fullmatch(r"[0-9a-f]{64}", blob.name):
            continue
        name = path.relative_to(folder).as_posix()
        is_known = name in known and known[name].origin == blob.name
        state = received.state_of(blob)
        if not (is_known and known[name].state == state) and sha256_file(blob) != blob.name:
            path.unlink()
            blob.unlink()
            damaged.append(name)
            continue
        seen[name] = Received(blob.name, state[0], blob.name, state)
    if seen != known:
        received.write(book, seen)
    if damaged:
        raise _Damaged(f"{', '.join(damaged)}: other bytes than the digest says; removed")
    return folder


def _split(name: str) -> tuple[str, str | None]:
    repository, _, revision = name.partition("@")
    return repository, revision or None


def _cache_dir() -> Path | None:
    """None is the client's own place."""
    return cache() / "hub" if current().cache else None
