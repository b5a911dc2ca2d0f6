"""The log of a job across broken connections and restarted pods: every line once, in order."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nvila.components.kube.cluster import Cluster
from nvila.components.kube.connect import Connection
from nvila.components.kube.errors import Away
from nvila.infra.launch.job import Pod
from nvila.infra.launch.jobs import Jobs
from nvila.infra.launch.logs import LogCopy, Place

Lines = list[tuple[str, str]]


class Pods:
    """Stands for the cluster: pods whose logs come as far as a connection lives, and from a whole second on."""

    def __init__(self) -> None:
        self.logs: dict[str, Lines] = {}
        self.breaks: dict[str, list[int]] = {}
        """By pod: after how many lines each connection breaks; later ones do not."""
        self.read = threading.Event()

    def pods(self, job_name: str) -> list[Pod]:
        state = {"containerStatuses": [{"state": {"running": {}}}]}
        return [Pod.of({"metadata": {"name": name, "uid": name}, "status": state}) for name in self.logs]

    def _asked(self, pod: str, since: str | None) -> Lines:
        return [(time, text) for time, text in self.logs[pod] if since is None or time >= since[:-1]]

    @contextmanager
    def log(self, pod: str, since: str | None, silence_seconds: float) -> Iterator[Iterator[bytes]]:
        breaks = self.breaks.get(pod, [])
        limit = breaks.pop(0) if breaks else None

        def lines() -> Iterator[bytes]:
            for number, (time, text) in enumerate(self._asked(pod, since)):
                if number == limit:
                    raise Away("broken")
                yield f"{time} {text}".encode()
            self.read.set()

        yield lines()


def copied(pods: Pods, then: Callable[[], None] = lambda: None) -> list[str]:
    out = io.StringIO()
    with LogCopy(pods, "j", out, pause_seconds=0.01):  # type: ignore[arg-type]
        assert pods.read.wait(10)
        then()
    return out.getvalue().split("\n")[:-1]


LINES: Lines = [
    ("2026-01-01T00:00:00.1Z", "a"),
    ("2026-01-01T00:00:00.10001Z", "b"),
    ("2026-01-01T00:00:00.2Z", "same"),
    ("2026-01-01T00:00:00.2Z", "same"),
    ("2026-01-01T00:00:00.2Z", "same"),
    ("2026-01-01T00:00:01Z", ""),
    ("2026-01-01T00:00:01.000000001Z", "  e f"),
]


def test_a_connection_that_breaks_anywhere_loses_and_repeats_nothing() -> None:
    """Asking again from the last second brings its lines again; asking from now on loses what came between."""
    for first in range(len(LINES)):
        for second in range(1, 4):
            pods = Pods()
            pods.logs["p"], pods.breaks["p"] = LINES, [first, second]
            assert copied(pods) == [text for _, text in LINES], (first, second)


def test_a_restarted_pod_is_read_from_its_beginning() -> None:
    """Its lines may be of the very second in which the first pod ended."""
    pods = Pods()
    pods.logs["p"] = LINES

    def restart() -> None:
        pods.read.clear()
        pods.logs["q"] = [("2026-01-01T00:00:01Z", "again")]
        assert pods.read.wait(10)

    assert copied(pods, restart) == [text for _, text in LINES] + ["again"]


def test_what_is_written_last_is_still_read() -> None:
    """The last lines say why the job failed, and come when the job has already ended."""
    pods = Pods()
    pods.logs["p"] = LINES[:1]
    assert copied(pods, lambda: pods.logs["p"].extend(LINES[6:]) or None) == ["a", "  e f"]


def test_times_of_other_zones_sort_with_utc() -> None:
    """A node's clock may be set to local time; its lines must not be taken for old ones."""
    place = Place("p")
    given = [b"2026-01-01T10:00:00.5+02:00 a", b"2026-01-01T08:00:00.6Z b"]
    assert list(place.fresh(given)) == ["a", "b"]
    assert place.since == "2026-01-01T08:00:00Z"


def test_what_is_no_line_of_the_log_does_not_end_the_copy() -> None:
    """The kubelet answers 200 with a complaint while a log is rotated away; a broken stream may end within a time."""
    place = Place("p")
    given = [b"unable to retrieve container logs for containerd://3bb6", b"", b"2026-01-01T08:00:00.6Z a", b"2026-01-0"]
    assert list(place.fresh(given)) == ["a"]
    assert list(place.fresh([b"2026-01-01T08:00:00.6Z a", b"2026-01-01T08:00:00.7Z b"])) == ["b"]


def test_the_log_of_the_training_container_is_asked_for() -> None:
    """A pod with an injected sidecar has two: asked for none of them, the API answers 400."""
    asked: list[Mapping[str, Any]] = []

    class Asking:
        connection = Connection(None, "c", "team-a")

        def lines(self, path: str, query: Mapping[str, Any], silence_seconds: float) -> None:
            asked.append(query)

    Jobs(Cluster(Asking())).log("p", None, 1.0)  # type: ignore[arg-type]
    assert asked[0]["container"] == "node"
