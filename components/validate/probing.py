"""Decodes every media file of the sources once, in two processes, and takes its digest."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Literal

from nvila.components.contracts.children import die_with_parent, first_to_end, forking, signal_name
from nvila.components.contracts.digests import medium_sha256
from nvila.components.contracts.progress import Progress
from nvila.components.data.media import Limits, MediaError, inside, probe

Kind = Literal["image", "video"]
PROCESSES = 2
CHUNK = 64
"""Files per task: large enough that handing them over costs nothing, small enough for a moving progress bar."""


@dataclass(frozen=True)
class Medium:
    """One media file as a record names it."""

    root: str
    name: str
    kind: Kind


@dataclass(frozen=True)
class Finding:
    """What probing found. `status` is `ok` or the name of the problem."""

    status: str
    detail: str = ""
    sha256: str | None = None
    """None where the file's bytes could not be read."""
    side_pixels: int | None = None
    """The shorter side."""
    frames: int | None = None


def probe_all(media: Iterable[Medium], limits: Limits) -> dict[Medium, Finding]:
    """A finding for each of `media`. A file whose decoder kills the process is a finding, too."""
    todo = sorted(set(media), key=lambda medium: (medium.root, medium.name))
    progress = Progress("media files decoded", len(todo))
    found: dict[Medium, Finding] = {}
    chunks = [todo[start : start + CHUNK] for start in range(0, len(todo), CHUNK)]
    pool = _pool(PROCESSES)
    try:
        with forking():
            asked = [pool.submit(_probe_chunk, chunk, limits) for chunk in chunks]
        for future in as_completed(asked):
            found |= (part := future.result())
            progress.update(len(part))
    except BrokenProcessPool:
        for medium in todo:
            if medium not in found:
                found[medium] = _probe_alone(medium, limits)
                progress.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return found


def _pool(processes: int) -> ProcessPoolExecutor:
    """Forked, because this process has no threads yet and the workers need what it has imported."""
    ends = (os.getpid(), signal.SIGKILL)
    return ProcessPoolExecutor(processes, get_context("fork"), initializer=die_with_parent, initargs=ends)


def _probe_chunk(chunk: list[Medium], limits: Limits) -> dict[Medium, Finding]:
    return {medium: _probe(medium, limits) for medium in chunk}


def _probe_alone(medium: Medium, limits: Limits) -> Finding:
    started = list[Any]()
    with _pool(1) as pool:
        try:
            with forking():
                asked = pool.submit(_probe, medium, limits)
            started = active_children()
            return asked.result()
        except BrokenProcessPool:
            pool.shutdown()
            code = first_to_end(child.exitcode for child in started) or 0
            how = f"was killed by signal {signal_name(-code)}" if code < 0 else f"ended with code {code}"
            return Finding("undecodable", f"the decoder crashed: it {how}")


def _probe(medium: Medium, limits: Limits) -> Finding:
    sha256 = None
    try:
        path = inside(Path(medium.root), medium.name)
        sha256 = medium_sha256(path)
        found = probe(path, medium.kind, limits)
    except MediaError as error:
        return Finding(error.problem, error.what, sha256)
    except OSError as error:
        return Finding("undecodable", f"cannot be read: {error.strerror}", sha256)
    return Finding("ok", "", sha256, min(found.width, found.height), found.frames)
