"""Fixtures of tests in several folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from turns import turn_of

from nvila.components.serve.ports import free_port
from nvila.components.tracking.connect import connected


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those whose turn it is not today are skipped. Files with slow tests come first: the last worker must not be left
    with one while the others are done."""
    for item in items:
        marker = item.get_closest_marker("turns")
        if marker and not turn_of(*marker.args):
            item.add_marker(pytest.mark.skip(reason="its turn comes on another day: EVERY_TEST=1 runs it"))
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sqlite store with its tables made, to be copied: making them takes seconds."""
    runs = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with connected(runs) as client:
            client.search_experiments()
    return runs / "mlflow.db"


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Variables as torchrun sets them for a single process."""
    import torch

    from nvila.components.train.engine import leave

    port = free_port("127.0.0.1")
    with pytest.MonkeyPatch.context() as patch:
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (variables | {"MASTER_PORT": str(port), "DS_LOG_LEVEL": "warning"}).items():
            patch.setenv(name, value)
        torch.set_num_threads(1)
        yield
        leave()  # the next module makes its own
