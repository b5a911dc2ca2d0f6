"""How long the chart takes from `helm install` until all its pods are ready, on a node that has the images."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "charts"))
from places import connect, new_place

NEEDED = ("KUBECONFIG", "NVILA_CRDS", "NVILA_NODE_IMAGE", "NVILA_POSTGRES_IMAGE")
ALLOWED_SECONDS = 60.0


def rows() -> Iterator[tuple[str, str, float, float, str]]:
    """Everything that the cluster can hold is switched on."""
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        print(f"no row of the chart's install: {', '.join(missing)} not set", file=sys.stderr)
        return
    cluster = connect(os.environ["KUBECONFIG"], Path(os.environ["NVILA_CRDS"]))
    with new_place(cluster, images=True) as place:
        began = time.monotonic()
        place.release()
        taken = time.monotonic() - began
    yield "install the chart until every pod is ready", "s", ALLOWED_SECONDS, taken, "the most that is allowed"
