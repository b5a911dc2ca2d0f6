"""The compiled package by the interpreter of the cluster tests: a whole run of pods, and runs terminated at each step.

On a test cluster of this machine whose node has our image: `KUBECONFIG`, `NVILA_CRDS` and `NVILA_NODE_IMAGE`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "cluster"))
from interpreted import JOBS, PODS, STEPS, prepared, terminate
from interpreter import SUCCEEDED
from kube import CRDS, install_crd

from nvila.components.contracts.steps import PREFLIGHT, RESOLVE
from nvila.components.kube.connect import connect
from nvila.components.kube.requests import Requests

NEEDED = ("KUBECONFIG", "NVILA_CRDS", "NVILA_NODE_IMAGE")
ALLOWED_SECONDS = 300.0


def rows() -> Iterator[tuple[str, str, float, float, str]]:
    """What a run takes, then how many of the terminated ones were closed as such and left no job."""
    if missing := [name for name in NEEDED if not os.environ.get(name)]:
        print(f"no rows of the IR interpreter: {', '.join(missing)} not set", file=sys.stderr)
        return
    kubeconfig, crds, image = (os.environ[name] for name in NEEDED)
    for name in CRDS:
        install_crd(Requests(connect(kubeconfig)), Path(crds, f"{name}.yaml"))
    with prepared(Path(kubeconfig), image) as ground:
        whole = ground.play(PODS, {})
        assert whole.state == SUCCEEDED, whole.ended
        most = "the most that is allowed"
        yield (
            f"IR interpreter: {len(STEPS)} steps of micro and report as pods",
            "s",
            ALLOWED_SECONDS,
            whole.seconds,
            most,
        )
        placed = ground.play(JOBS, {}, PREFLIGHT, terminate)
        known, right, seconds = {**whole.ended, RESOLVE: placed.ended[RESOLVE]}, 0, 0.0
        for step in STEPS:
            run = ground.play(JOBS, known, step, terminate)
            faults = ground.faults(run, step)
            right, seconds = right + (not faults), seconds + run.seconds
            print(f"terminated at {step}, {run.seconds:.0f} s:", *faults or ["as it has to be"], sep="\n  ", flush=True)
        yield "IR interpreter: termination at each of the steps", "runs", len(STEPS), right, "steps"
        yield "IR interpreter: a terminated run, mean", "s", whole.seconds, seconds / len(STEPS), "a whole run"
