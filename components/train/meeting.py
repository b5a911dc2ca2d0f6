"""Waits until all nodes of a training job are there, before torchrun's agents do so in a way that hears no signal."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.progress import waiting_for

if TYPE_CHECKING:
    from torch.distributed import TCPStore

MEET_SECONDS = 3600.0
"""Nodes come one by one where pods are scheduled singly, machines are started first, or an image of 20 GB is pulled."""
_COUNT = "nvila/nodes"


def meet(address: str, port: int, nodes: int, node: int) -> TCPStore:
    """The store that the first node keeps at `address`; the agents share it. Keep it as long as they run.

    Raises:
        NvilaError: some did not come in time.
    """
    from torch.distributed import DistError

    deadline = time.monotonic() + MEET_SECONDS
    while True:
        if node:
            _wait_for_first(address, port, deadline)
        try:
            return _gather(address, port, nodes, node, deadline)
        except DistError as error:
            # Where the first node is taken away, what becomes of the job is its to say: an error here would count.
            if node == 0:
                raise
            _pause(deadline, f"the first node was lost: {error}", where=f"{address}:{port}")


def _gather(address: str, port: int, nodes: int, node: int, deadline: float) -> TCPStore:
    from torch.distributed import TCPStore

    store = TCPStore(address, port, nodes, is_master=node == 0, wait_for_workers=False, multi_tenant=True)
    # A node whose pod is replaced while the others wait comes twice, and is one.
    there, said = store.add(_COUNT, store.add(f"{_COUNT}/{node}", 1) == 1), 0
    while there < nodes:
        if there != said:
            waiting_for(f"{there} of {nodes} nodes are there")
            said = there
        _pause(deadline, f"only {there} of {nodes} nodes came")
        there = store.add(_COUNT, 0)
    return store


def _wait_for_first(address: str, port: int, deadline: float) -> None:
    """Its name is not known before its pod is there, and nobody listens before its program has started."""
    while True:
        try:
            socket.create_connection((address, port), timeout=2.0).close()
            return
        except OSError as error:
            _pause(deadline, f"the first node cannot be reached: {error}", where=f"{address}:{port}")


def _pause(deadline: float, missing: str, where: str | None = None) -> None:
    if time.monotonic() > deadline:
        raise NvilaError(missing, where=where, do="Look at the job's pods: which wait, and for what?")
    time.sleep(1.0)
