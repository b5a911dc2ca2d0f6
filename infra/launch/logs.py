"""Copies the log of a job's first node to this process's own, across broken connections and restarted pods."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TextIO

from nvila.components.kube.errors import Away
from nvila.components.tracking.redact import tell
from nvila.infra.launch.job import Pod
from nvila.infra.launch.jobs import Jobs

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")
SILENCE_SECONDS = 60.0
"""A connection on which nothing came for so long is opened anew: it may be dead without our being told."""


class LogCopy:
    """A thread that follows the log while the context is open; leaving it waits a little for the last lines."""

    def __init__(self, jobs: Jobs, job_name: str, out: TextIO | None = None, pause_seconds: float = 2.0) -> None:
        self._jobs, self._job = jobs, job_name
        self._out = out if out is not None else sys.stdout
        self._pause = pause_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"log of {job_name}", daemon=True)

    def __enter__(self) -> LogCopy:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._over.set()
        if kind is None:  # whoever was asked to stop has no time
            self._thread.join(10.0)

    def _follow(self) -> None:
        place: Place | None = None
        while True:
            last_round = self._over.is_set()
            try:
                pod = first_pod(self._jobs.pods(self._job) or [])
                if pod is not None and pod.has_log:
                    if place is None or place.pod != pod.uid:
                        place = Place(pod.uid)
                    self._copy(pod.name, place)
            except (Away, OSError, ValueError):
                pass  # the log is a courtesy: what becomes of the job is told elsewhere
            if last_round:
                return
            self._over.wait(self._pause)

    def _copy(self, pod: str, place: Place) -> None:
        with self._jobs.log(pod, place.since, SILENCE_SECONDS) as lines:
            for text in place.fresh(lines):
                self._out.write(tell(text) + "\n")
                self._out.flush()


def first_pod(pods: Sequence[Pod]) -> Pod | None:
    """The newest pod of the first node, whose log tells of the whole job."""
    return next((pod for pod in reversed(pods) if pod.node == 0), None)


class Place:
    """How far the log of one pod has been read: lines come again when a connection is opened anew."""

    def __init__(self, pod: str) -> None:
        self.pod = pod
        self._last = ""
        self._at_last = 0

    @property
    def since(self) -> str | None:
        """From when on to ask, in whole seconds, as the API counts."""
        return f"{self._last[:19]}Z" if self._last else None

    def fresh(self, lines: Iterable[bytes]) -> Iterable[str]:
        """The lines that had not been read before, without their times. Lines of the very same time are counted."""
        again, known, last = 0, self._at_last, self._last
        for line in lines:
            stamp, _, text = line.decode(errors="replace").partition(" ")
            time = _sortable(stamp)
            if time is None:  # the kubelet's own words about a log that it cannot read
                continue
            if time < last:
                continue
            if time == last and again < known:
                again += 1
                continue
            self._at_last = self._at_last + 1 if time == self._last else 1
            self._last = time
            yield text


def _sortable(stamp: str) -> str | None:
    """A time of a log line, in UTC and with nine digits behind the point: such texts sort as the times do.

    None where it is no time.
    """
    if not _TIME.fullmatch(stamp):
        return None
    whole, zone = (stamp[:-1], "") if stamp.endswith("Z") else (stamp[:-6], stamp[-6:])
    seconds, _, fraction = whole.partition(".")
    if zone not in ("", "+00:00"):
        seconds = datetime.fromisoformat(seconds + zone).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{seconds}.{fraction:0<9}"
