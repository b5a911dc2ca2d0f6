"""A real API server for the chart, and places on it to install it; see places.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from places import Cluster, Place, connect, new_place, variable


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    return connect(variable("KUBECONFIG"), Path(variable("NVILA_CRDS")))


@pytest.fixture
def make_place(cluster: Cluster) -> Iterator[Callable[..., Place]]:
    """Makes places; what is in them is removed afterwards."""
    with ExitStack() as places:
        yield lambda *more, images=False: places.enter_context(new_place(cluster, *more, images=images))


@pytest.fixture
def running(make_place: Callable[..., Place]) -> Place:
    """A place in which pods run."""
    variable("NVILA_NODE_IMAGE")
    variable("NVILA_POSTGRES_IMAGE")
    return make_place(images=True)
