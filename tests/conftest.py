"""Fixtures of tests in several folders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nvila.components.serve.ports import free_port


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
