"""What serving pods say of their requests; small servers play pods that are slow, broken, huge or others than meant."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvila.components.rollout.policy import Counters
from nvila.infra.controller.scrape import MOST_BYTES, SECONDS, parse, scrape
from nvila.infra.controller.seen import Pod, Running

COUNTED = Counters(12, 1, 11, 3.25, 400, 8.5)


def text(counted: Counters = COUNTED, restarts: int = 2, version: str = "7") -> str:
    """As a pod writes it."""
    values = {**vars(counted), "restarts": restarts}
    lines = [f"# TYPE nvila_endpoint_{name}_total counter\n" for name in values]
    labels = f'{{model="a \\"b\\", version=\\"1\\"",version="{version}"}}'
    lines += [f"nvila_endpoint_{name}_total{labels} {value}\n" for name, value in values.items()]
    return "".join([*lines, f"nvila_endpoint_ready{labels} 1\n", "python_gc_objects_collected_total 3.0\n"])


def answer(body: str, head: str = "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n") -> bytes:
    return (head + body).encode()


Answer = Callable[[socket.socket], None]


def at_once(said: bytes) -> Answer:
    return lambda connection: connection.sendall(said)


def drip(connection: socket.socket) -> None:
    """A byte now and then, so that no read waits long."""
    connection.sendall(b"HTTP/1.0 200 OK\r\n")
    while True:
        connection.sendall(b"x")
        time.sleep(SECONDS / 8)


@contextmanager
def pods(*answers: Answer) -> Iterator[tuple[int, tuple[Pod, ...]]]:
    """Pods that answer so, each at an address of its own (127.0.0.2 on) and all at the same port."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    addresses = [f"127.0.0.{number}" for number in range(2, 2 + len(answers))]
    with ExitStack() as stack:
        for address, said in zip(addresses, answers, strict=True):
            listening = stack.enter_context(closing(socket.create_server((address, port))))
            threading.Thread(target=_serve, args=(listening, said), daemon=True).start()
        yield port, tuple(Pod(f"pod {number}", address, restarts=1) for number, address in enumerate(addresses))


def _serve(listening: socket.socket, said: Answer) -> None:
    while True:
        with suppress(BrokenPipeError, ConnectionResetError):
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with closing(connection):
                connection.recv(1 << 16)
                said(connection)


def test_pods_are_asked_at_once() -> None:
    """One after the other, pods that hang keep the whole loop waiting."""
    all_there = threading.Barrier(8)

    def together(connection: socket.socket) -> None:
        all_there.wait(SECONDS / 2)
        connection.sendall(answer(text()))

    with pods(*[together] * 8) as (port, found):
        seen = scrape({("m", "7"): Running(found, wanted=9), ("n", "8"): Running()}, port)
    assert [one.counted for one in seen["m", "7"].pods] == [COUNTED] * 8
    assert {one.restarts for one in seen["m", "7"].pods} == {3} and seen["m", "7"].wanted == 9
    assert seen["n", "8"] == Running()


def test_a_pod_that_does_not_answer_is_not_waited_for() -> None:
    """A breach by its neighbour would be seen when it ends, or never."""
    huge, good = at_once(b"HTTP/1.0 200 OK\r\n\r\n" + b"y" * (MOST_BYTES * 3)), at_once(answer(text()))
    with pods(drip, huge, lambda _: time.sleep(60), good) as (port, found):
        given = (*found, Pod("gone", "127.0.0.99"), Pod("placeless"))
        seen = scrape({("m", "7"): Running(given)}, port)["m", "7"]
    assert list(seen.counted) == ["pod 3"]
    assert [one.restarts for one in seen.pods] == [1, 1, 1, 3, 0, 0]


@pytest.mark.parametrize(
    "said",
    [
        b"",
        answer(text(), "HTTP/1.0 503 Service Unavailable\r\n\r\n"),
        answer(text(), "HTTP/1.0 200 OK\r\nContent-Le"),
        answer(text(), ""),
        answer(text()[:-1]),
        answer(text()[:-200]),
        b"\xff\xfe" + answer(text()),
    ],
)
def test_half_an_answer_is_none(said: bytes) -> None:
    """Counters that seem to shrink look like a server that started anew, and its requests count twice."""
    with pods(at_once(said)) as (port, found):
        assert scrape({("m", "7"): Running(found)}, port)["m", "7"].pods == found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("requests_total", "requests"),
        ("requests_total{", "others_total{"),
        ("} 12\n", "} 12.5\n"),
        ("} 12\n", "} -12\n"),
        ("} 3.25\n", "} nan\n"),
        ("} 3.25\n", "} +Inf\n"),
        ("} 3.25\n", "} 1e999\n"),
        ("} 400\n", "} four\n"),
        ('version="7"', 'version="8"'),
        ('version="7"', 'name="7"'),
        ("# TYPE", 'nvila_endpoint_errors_total{version="7"} 1\n# TYPE'),
    ],
)
def test_only_what_is_meant_counts(old: str, new: str) -> None:
    """The address may be another pod's by now, and a number that is none decides about a promotion."""
    assert parse(text(), "7") == (COUNTED, 2) and old in text()
    assert parse(text().replace(old, new), "7") is None


@given(st.builds(Counters, *(st.integers(0, 2**53),) * 3, st.floats(0, 1e9), st.integers(0, 2**53), st.floats(0, 1e9)))
def test_any_count_is_read(counted: Counters) -> None:
    """Large numbers are written with an exponent."""
    assert parse(text(counted), "7") == (counted, 2)


@given(st.text())
def test_any_text_is_read_or_not(found: str) -> None:
    """Whatever listens there must not end the loop."""
    assert parse(found, "7") is None
