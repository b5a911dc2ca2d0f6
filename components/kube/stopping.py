"""What a step has to know when it is asked to stop: whether its pod is only being moved; and time to clean up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from nvila.components.contracts.environment import Environment
from nvila.components.kube.cluster import POD, Cluster
from nvila.components.kube.errors import ApiError
from nvila.components.kube.requests import Patience

_LOOK = Patience.once(5.0)
"""A pod that is asked to stop has 30 s to do so."""


def is_moved(cluster: Cluster, here: Environment) -> bool:
    """Whether Kubernetes takes this process's pod from its node (which is drained, say), and it is not the pipeline
    run that is the reason to stop: what the step has begun elsewhere is to go on then."""
    if not here.in_cluster:
        return False
    try:
        pods = cluster.find(POD, fields=f"metadata.name={here.hostname}", patience=_LOOK)
    except ApiError:
        return False
    conditions = [c for pod in pods for c in (pod.get("status") or {}).get("conditions") or []]
    return any(c["type"] == "DisruptionTarget" and c["status"] == "True" for c in conditions)


@contextmanager
def undisturbed() -> Iterator[None]:
    """A second request to stop must not interrupt the answer to the first."""
    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
