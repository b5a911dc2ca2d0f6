"""What becomes of a training job when the API server, the launcher or a watch fails.

On the API server of a test cluster, which is stopped and started: `KUBECONFIG`, `NVILA_CRDS` and `NVILA_KUBE_TOOLS`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).parents[2] / "cluster"))
from kube import CRDS, ApiServer, install_crd, wait_for, write_kubeconfig, write_status
from launches import Launch

from nvila.components.kube.cluster import Cluster
from nvila.components.kube.connect import connect
from nvila.components.kube.requests import Requests
from nvila.infra.launch.job import Job
from nvila.infra.launch.jobs import Jobs
from nvila.infra.launch.trainjob import STEP_LABEL

OUTAGE_SECONDS = 30.0
Row = tuple[str, str, float, float, str]


def rows() -> Iterator[Row]:
    """Jobs afterwards beside the one before, and how long the launcher takes to go on."""
    names = ("KUBECONFIG", "NVILA_CRDS", "NVILA_KUBE_TOOLS")
    if missing := [name for name in names if not os.environ.get(name)]:
        print(f"no rows of the launcher: {', '.join(missing)} not set", file=sys.stderr)
        return
    kubeconfig, crds, tools = (Path(os.environ[name]) for name in names)
    admin, namespace = Requests(connect(str(kubeconfig))), f"nvila-bench-{uuid.uuid4().hex[:8]}"
    for name in CRDS:
        install_crd(admin, crds / f"{name}.yaml")
    admin.ask("POST", "/api/v1/namespaces", body={"metadata": {"name": namespace}})
    try:
        with tempfile.TemporaryDirectory() as name:
            inside = write_kubeconfig(kubeconfig, Path(name, "kubeconfig"), namespace)
            with mock.patch.dict(os.environ, KUBECONFIG=str(inside)):
                launch = Launch.of_new_work(Path(name), Jobs(Cluster(Requests(connect(str(inside))))))
                try:
                    yield from _survived(launch, admin, ApiServer(tools, kubeconfig.parent))
                finally:
                    launch.end()
    finally:
        admin.ask("DELETE", f"/api/v1/namespaces/{namespace}")


def _survived(launch: Launch, admin: Requests, server: ApiServer) -> Iterator[Row]:
    """One job and one launcher after the other trouble."""
    process = launch.start()
    job = launch.attached()
    began = time.monotonic()
    server.kill()
    time.sleep(OUTAGE_SECONDS)
    server.start()
    back = time.monotonic()
    wait_for(lambda: "answers again" in launch.said(), launch.said())
    away = f"API server away for {back - began:.0f} s"
    yield f"{away}: the launcher goes on", "s", back - began, time.monotonic() - back, "the outage"
    yield _jobs(launch, job, away)
    # The server's watch cache begins at its start, so the version that the job had before has expired.
    launch.jobs.wait_for_change(replace(job, version="1"), 5)
    yield _jobs(launch, job, "watch expired (410)")
    process.kill()
    process.wait()
    process = launch.start()
    launch.attached()
    yield _jobs(launch, job, "launcher killed and started again")
    launch.answer(done=True)
    write_status(admin, launch.jobs.namespace, launch.name, "Complete")
    began = time.monotonic()
    assert launch.ends(process) == 0, launch.said()
    yield "from `Complete` to the outcome", "s", 15.0, time.monotonic() - began, "looking at it every 15 s"


def _jobs(launch: Launch, before: Job, what: str) -> Row:
    """Jobs of this step, each with the identity that the job had before; another identity counts as one more."""
    found = launch.jobs.find(f"{STEP_LABEL}=train-1")
    same = [job for job in found if job.uid == before.uid]
    others = len(found) - len(same) + (not same)
    return f"{what}: jobs", "jobs", 1.0, float(len(same) + others), "the job before"
