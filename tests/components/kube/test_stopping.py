"""A step that is asked to stop, and what its pod says of why."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from nvila.components.contracts.environment import Environment
from nvila.components.kube.cluster import Cluster
from nvila.components.kube.connect import Connection
from nvila.components.kube.errors import Denied
from nvila.components.kube.stopping import is_moved, undisturbed

IN_POD = Environment(in_cluster="10.0.0.1", hostname="step-1")


class OnePod:
    """Stands for an API server that answers this when it is asked for pods."""

    connection = Connection(None, "c", "team-a")

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, list[Any]()

    def ask(self, method: str, path: str, *, query: Any = None, **_: Any) -> dict[str, Any]:
        self.asked.append((path, query))
        if isinstance(self.answer, Exception):
            raise self.answer
        return {"items": [{"status": {"conditions": self.answer}}]}


@pytest.mark.parametrize(
    ("answer", "moved"),
    [
        ([{"type": "DisruptionTarget", "status": "True"}], True),
        ([{"type": "DisruptionTarget", "status": "False"}, {"type": "Ready", "status": "True"}], False),
        ([], False),
        (Denied("no"), False),
    ],
)
def test_only_a_pod_that_kubernetes_disrupts_is_moved(answer: Any, moved: bool) -> None:
    """What a cancelled run has begun would go on for days; what a drained node's has, would be begun anew."""
    server = OnePod(answer)
    assert is_moved(Cluster(server), IN_POD) is moved  # type: ignore[arg-type]
    assert server.asked == [("/api/v1/namespaces/team-a/pods", {"fieldSelector": "metadata.name=step-1"})]
    assert not is_moved(Cluster(server), Environment()) and len(server.asked) == 1  # type: ignore[arg-type]


def test_a_second_request_to_stop_does_not_cut_the_answer_to_the_first() -> None:
    """Ctrl-C twice would leave the job, or the alias, behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts behind a & ignores it
    with undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)
