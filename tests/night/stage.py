"""One cell's place: a namespace with served models of its own, the controller beside it, and what people do to them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asking import Asking
from controllers import InPod, OnMachine
from ground import Ground
from kube import default_account, wait_for, write_kubeconfig
from timeline import Look, Timeline

from nvila.components.contracts.environment import for_child, named
from nvila.components.contracts.modelrollout import API, PLURAL, ServingPolicy, Spec, dump
from nvila.components.contracts.serving import Gateway, Pods
from nvila.components.kube.connect import connect
from nvila.components.kube.requests import MERGE, Patience, Requests

POLICY = ServingPolicy(
    pinned_prompts=4,
    steps=[25, 60, 100],
    min_requests=6,
    min_seconds=1.5,
    step_deadline_seconds=90,
    deadline_seconds=180,
    drain_seconds=3,
)
"""Times of a rollout that is over in half a minute."""
USER = 65532
"""Of pods."""


@dataclass(frozen=True)
class Served:
    """What pods serve with."""

    pods: Pods
    pause_seconds: float
    """Of each client between two requests."""
    patience_seconds: float
    """For anything to come about."""
    real: bool = False
    """With vLLM, which does not say which version it is."""


STAND_IN = Served(Pods(gpus=0, cpu="50m", memory="1Gi", shared_memory="64Mi"), 0.15, 150.0)
VLLM = Served(Pods(gpus=0, cpu="50m", memory="8Gi", shared_memory="1Gi"), 1.5, 600.0, real=True)


class Stage:
    """The names of its ModelRollouts are the scenario's; those of their models are this cell's own."""

    def __init__(
        self,
        ground: Ground,
        names: Sequence[str],
        controller: type[OnMachine | InPod] = OnMachine,
        served: Served = STAND_IN,
        **policy: Any,
    ) -> None:
        self.ground, self.names, self.namespace = ground, names, f"night-{uuid.uuid4().hex[:8]}"
        self.timelines: dict[str, Timeline] = {}
        self.asking: dict[str, Asking] = {}
        self.served = served
        self._policy = POLICY.model_copy(update=policy)
        self._folder = ground.folder / self.namespace
        self._folder.mkdir()
        self.kubeconfig = write_kubeconfig(ground.kubeconfig, self._folder / "kubeconfig", self.namespace)
        self.controller = controller(ground, self.namespace, self.kubeconfig, self._folder / "controller.log")

    def model(self, name: str) -> str:
        """The registered model of a ModelRollout."""
        return f"{self.namespace}.{name}"

    @contextmanager
    def standing(self) -> Iterator[Stage]:
        """With the controller running, as long as the context is open."""
        try:
            self._make()
            self.controller.start()
            for name in self.names:
                watcher = Requests(connect(str(self.kubeconfig)), Patience.once(3))
                self.timelines[name] = Timeline(watcher, self.namespace, name)
            yield self
        finally:
            self.stop_looking()
            self.controller.kill()
            admin = self.ground.admin
            admin.ask("DELETE", f"/api/v1/namespaces/{self.namespace}")
            admin.ask("DELETE", f"/api/v1/persistentvolumes/{self.namespace}")

    def stop_looking(self) -> None:
        """No timeline goes on."""
        for timeline in self.timelines.values():
            timeline.stop()

    def said(self) -> str:
        """The end of the controller's log."""
        return self.controller.said()

    def register(self, name: str, number: int, **behaviour: Any) -> None:
        """The next version of a model; the first one is asked for at once."""
        self.ground.registry.register(self.model(name), number, real=self.served.real, **behaviour)
        if number == 1:
            self.ground.registry.point(self.model(name), "challenger", "1")

    @contextmanager
    def asked(self) -> Iterator[None]:
        """With clients, once version 1 of each model serves and the Gateway and the node's Services know it."""
        with ExitStack() as stack:
            for name in self.names:
                self.wait(name, lambda look: look.serves_alone("1"), "version 1 does not serve")
                asking = Asking(self.ground.front, self.host(name), self.model(name), self.served.pause_seconds)
                wait_for(asking.answered, f"version 1 of {name} does not answer")
                self.asking[name] = stack.enter_context(asking.kept_up())
            yield

    def wait(self, name: str, there: Callable[[Look], bool], what: str) -> None:
        """Until something is stored of a ModelRollout."""
        deadline = time.monotonic() + self.served.patience_seconds
        while not there(look := self.timelines[name].last):
            assert time.monotonic() < deadline, f"{name}: {what}: {look}\n{self.said()}"
            time.sleep(0.05)

    def host(self, name: str) -> str:
        """That users ask."""
        return f"{name}.{self.namespace}.test"

    def change(self, name: str, **spec: Any) -> None:
        """Fields of a ModelRollout's spec, as `kubectl patch` does."""
        path = f"/apis/{API}/namespaces/{self.namespace}/{PLURAL}/{name}"
        self.ground.admin.ask("PATCH", path, body={"spec": spec}, form=MERGE)

    def run(self, *command: str) -> str:
        """`nvila` as a person types it, with this cluster and registry; its output."""
        program = [sys.executable, "-m", "nvila.pipelines.cli", *command]
        variables = {"KUBECONFIG": str(self.kubeconfig)}
        ran = subprocess.run(program, env=for_child(variables), capture_output=True, text=True, cwd=self._folder)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def _make(self) -> None:
        admin, core = self.ground.admin, f"/api/v1/namespaces/{self.namespace}"
        admin.ask("POST", "/api/v1/namespaces", body={"metadata": {"name": self.namespace}})
        default_account(admin, self.namespace)
        site = named(mlflow_tracking_uri=self.ground.registry.url)
        admin.ask("POST", f"{core}/configmaps", body={"metadata": {"name": "nvila-site"}, "data": site})
        self._volume(self._folder / "cache")
        listener = {"name": "http", "port": 80, "protocol": "HTTP"}
        gateway = {"gatewayClassName": "night", "listeners": [listener]}
        body = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"name": "gateway"}}
        path = f"/apis/gateway.networking.k8s.io/v1/namespaces/{self.namespace}/gateways"
        admin.ask("POST", path, body=body | {"spec": gateway})
        for name in self.names:
            spec = Spec(
                model=self.model(name),
                image=self.ground.serve_image() if self.served.real else self.ground.image,
                gateway=Gateway(name="gateway"),
                hostnames=[self.host(name)],
                pods=self.served.pods,
                policy=self._policy,
            )
            made = {"apiVersion": API, "kind": "ModelRollout", "metadata": {"name": name}, "spec": dump(spec)}
            admin.ask("POST", f"/apis/{API}/namespaces/{self.namespace}/{PLURAL}", body=made)

    def _volume(self, folder: Path) -> None:
        """A folder of this machine as the node's cache: the test cluster has no storage class."""
        folder.mkdir()
        os.chown(folder, USER, USER)
        spec = {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "claimRef": {"namespace": self.namespace, "name": "nvila-cache"},
            "hostPath": {"path": str(folder), "type": "Directory"},
        }
        admin = self.ground.admin
        admin.ask("POST", "/api/v1/persistentvolumes", body={"metadata": {"name": self.namespace}, "spec": spec})
        claim = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
        claim |= {"resources": {"requests": {"storage": "1Gi"}}}
        path = f"/api/v1/namespaces/{self.namespace}/persistentvolumeclaims"
        admin.ask("POST", path, body={"metadata": {"name": "nvila-cache"}, "spec": claim})
