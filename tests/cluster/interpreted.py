"""Runs of the compiled package on a test cluster: pods of our images, volumes, and a webhook that hears how they end.

Needs a node on this machine that has the image `NVILA_NODE_IMAGE`, of this very code. Kubeflow Trainer is not there, so
a job stays as it was made: a step that waits for one waits until the run is terminated.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from executor_pods import RUN_LABEL as POD_RUN_LABEL
from executor_pods import Pods
from interpreter import CANCELLED, SKIPPED, SUCCEEDED, Ended, Interpreter
from kube import default_account, service_account, wait_for, write_kubeconfig

from nvila.components.contracts.environment import name_of
from nvila.components.contracts.site import CONFIG_MAP as SITE
from nvila.components.contracts.steps import REPORT, ROWS
from nvila.components.kube.cluster import CONFIG_MAP, NODE, POD, SECRET, VOLUME_CLAIM, Cluster, Kind
from nvila.components.kube.connect import connect
from nvila.components.kube.requests import Patience, Requests
from nvila.infra.launch.jobs import Jobs
from nvila.infra.launch.trainjob import RUN_LABEL, STEP_LABEL
from nvila.pipelines.compile import names
from nvila.pipelines.compile.package import compiled

sys.path.append(str(Path(__file__).parents[1] / "charts"))
from helming import find, render

STEPS = [name for name, row in ROWS.items() if not row.at_exit]
PODS: dict[str, Any] = {"gpus_per_node": 0}
"""A site whose steps work in their own pods."""
JOBS: dict[str, Any] = {
    "launcher": "nvila.infra.launch.launcher",
    "gpus_per_node": 2,
    "node_cpu": "1900m",
    "node_memory": "8Gi",
    "gpu_labels": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
}
"""One whose heavy steps become jobs; the others, such as `quantize`, take one of the node's (pretended) GPUs."""
_VOLUME, _SERVICE, _ENDPOINTS = (
    Kind("v1", "PersistentVolume", "persistentvolumes", namespaced=False),
    Kind("v1", "Service", "services"),
    Kind("v1", "Endpoints", "endpoints"),
)


@dataclass(frozen=True)
class Played:
    """A run that is over."""

    name: str
    state: str
    ended: Mapping[str, Ended]
    seconds: float

    def log(self, folder: Path, step: str, attempt: int = 0) -> str:
        """What that start of the step has printed."""
        return (folder / self.name / step / f"{attempt}.log").read_text()


@dataclass(frozen=True)
class Ground:
    """A namespace with all that a run's pods ask for."""

    cluster: Cluster
    requests: Requests
    folder: Path
    image: str
    told: list[dict[str, Any]]
    """What the webhook has heard."""

    def play(
        self,
        site: Mapping[str, Any],
        known: Mapping[str, Ended],
        at: str = "",
        then: Callable[[Interpreter, Path], None] = lambda run, folder: None,
        **form: Any,
    ) -> Played:
        """One run of `micro`, in which `then` is called once the step `at` is at work, if one is named.

        Args:
            known: what earlier runs have put out; of it the run gets that of the steps before `at`.
        """
        self.cluster.apply(
            CONFIG_MAP, {"metadata": {"name": SITE}, "data": {name_of("site"): json.dumps(site)}}, "test"
        )
        name, began = f"run-{uuid.uuid4().hex[:8]}", time.monotonic()
        pods = Pods(self.cluster, self.requests, name, self.folder, "pipeline-runner")
        (root := self.folder / name).mkdir()
        root.chmod(0o777)
        known = {step: known[step] for step in _before(at) if step in known} if at else known
        run = Interpreter(compiled(self.image, self.image), pods, root, known)
        with self._as_new(at), ThreadPoolExecutor(1) as thread:
            state = thread.submit(run.run, recipe="micro", **form)
            if at:
                wait_for(lambda: state.done() or self._at_work(at, site, name), f"{at} does not begin", 300)
                then(run, root / at)
            return Played(name, state.result(), run.ended, time.monotonic() - began)

    def faults(self, run: Played, at: str) -> list[str]:
        """What is not as it has to be after a run that was terminated when the step `at` was at work."""
        found = [f"the run is {run.state}"] if run.state != CANCELLED else []
        if ROWS[at].job and run.ended[at].state != CANCELLED:
            found.append(f"{at} is {run.ended[at].state}")
        behind = [step for step in STEPS if at in _before(step)]
        found += [f"{step} is {run.ended[step].state}" for step in behind if run.ended[step].state != SKIPPED]
        found += [f"{REPORT} is {run.ended[REPORT].state}"] if run.ended[REPORT].state != SUCCEEDED else []
        heard = [one["type"] for one in self.told if one["data"]["run"] == run.name]
        found += [f"the webhook has heard {heard}"] if heard != ["run.stopped"] else []
        jobs = Jobs(self.cluster)
        try:
            wait_for(lambda: not jobs.find(f"{RUN_LABEL}={run.name}"), "jobs of the run are left")
        except AssertionError as left:
            found.append(str(left))
        pods = self.cluster.find(POD, labels=f"{POD_RUN_LABEL}={run.name}")
        found += [one["metadata"]["name"] for one in pods if one["status"]["phase"] in ("Pending", "Running")]
        if (database := self.volume / "runs" / "mlflow.db").is_file():
            with sqlite3.connect(database.as_uri() + "?mode=ro", uri=True) as rows:
                going = rows.execute("select name from runs where status = 'RUNNING'").fetchall()
            found += [f"MLflow's run {name} goes on" for (name,) in going]
        return found

    @property
    def volume(self) -> Path:
        """That of the store and the runs."""
        return self.folder / names.VOLUME_CLAIM

    def _at_work(self, step: str, site: Mapping[str, Any], run: str) -> bool:
        if ROWS[step].job and site.get("launcher"):
            return bool(Jobs(self.cluster).find(f"{RUN_LABEL}={run},{STEP_LABEL}={step}"))
        return any((self.volume / "store" / step).glob("[!.]*"))

    @contextmanager
    def _as_new(self, step: str) -> Iterator[None]:
        """What the step has done in other runs is not there, else it would be skipped."""
        place, aside = self.volume / "store" / step, self.folder / "aside"
        if there := bool(step) and place.exists():
            place.rename(aside)
        try:
            yield
        finally:
            if there:
                shutil.rmtree(place, ignore_errors=True)
                aside.rename(place)


def terminate(run: Interpreter, folder: Path) -> None:
    """What KFP's button does."""
    run.terminate()


def kill(run: Interpreter, folder: Path) -> None:
    """End the step's process hard; the node is this machine."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "kfp.dsl.executor_main" in words and any(f"{folder}/executor_output.json" in word for word in words):
            process.kill()


@contextmanager
def prepared(kubeconfig: Path, image: str) -> Iterator[Ground]:
    """Everything is there as long as the context is open."""
    name = f"nvila-ir-{uuid.uuid4().hex[:8]}"
    admin = Requests(connect(str(kubeconfig)), Patience.within(60))
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir="/tmp", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        folder.chmod(0o755)
        requests = Requests(connect(str(write_kubeconfig(kubeconfig, folder / "config", name))), Patience.within(60))
        cluster, told = Cluster(requests), list[dict[str, Any]]()
        admin.ask("POST", "/api/v1/namespaces", body={"metadata": {"name": name}})
        try:
            default_account(admin, name)
            service_account(admin, name, "pipeline-runner", find(render(), "Role", "nvila-launcher")["rules"])
            for claim in (names.VOLUME_CLAIM, names.CACHE_CLAIM):
                _claim(cluster, claim, folder / claim)
            with _hook(cluster, told) as url:
                body = {"metadata": {"name": names.SECRET}, "stringData": {name_of("webhook_url"): url}}
                cluster.create(SECRET, body)
                yield Ground(cluster, requests, folder, image, told)
        finally:
            admin.ask("DELETE", f"/api/v1/namespaces/{name}")
            for claim in (names.VOLUME_CLAIM, names.CACHE_CLAIM):
                admin.ask("DELETE", cluster.path(_VOLUME, f"{name}-{claim}"))


def _before(step: str) -> set[str]:
    """All steps that have to be over before it begins."""
    return ROWS[step].before.union(*(_before(other) for other in ROWS[step].before))


def _claim(cluster: Cluster, name: str, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    mode = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    taken = {"claimRef": {"namespace": cluster.namespace, "name": name}, "hostPath": {"path": str(folder)}}
    size = {"storage": "1Gi"}
    volume = {"metadata": {"name": f"{cluster.namespace}-{name}"}, "spec": {**mode, **taken, "capacity": size}}
    cluster.create(_VOLUME, volume)
    cluster.create(VOLUME_CLAIM, {"metadata": {"name": name}, "spec": {**mode, "resources": {"requests": size}}})


@contextmanager
def _hook(cluster: Cluster, told: list[dict[str, Any]]) -> Iterator[str]:
    """URL inside the cluster of a webhook on this machine."""

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    (node,) = cluster.find(NODE)
    address = next(one["address"] for one in node["status"]["addresses"] if one["type"] == "InternalIP")
    server = ThreadingHTTPServer((address, 0), Hook)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ports = [{"port": server.server_port}]
    cluster.create(_SERVICE, {"metadata": {"name": "hook"}, "spec": {"ports": ports}})
    cluster.create(
        _ENDPOINTS, {"metadata": {"name": "hook"}, "subsets": [{"addresses": [{"ip": address}], "ports": ports}]}
    )
    try:
        yield f"http://hook.{cluster.namespace}.svc:{server.server_port}/"
    finally:
        server.shutdown()
