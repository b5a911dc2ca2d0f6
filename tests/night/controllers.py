"""The controller of a cell: a process of this machine, or a pod of the chart's with no more rights than that has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import psutil
import yaml
from ground import Ground
from helming import template
from kube import wait_for
from places import Cluster

from nvila.components.contracts.environment import for_child, named
from nvila.components.serve.ports import free_port

MODULE = "nvila.infra.controller"
KINDS = ("ServiceAccount", "Role", "RoleBinding", "Deployment")


class Controller(Protocol):
    """It may be killed at any moment."""

    def start(self) -> None:
        """Have one run; the first, or one after another was killed."""

    def kill(self) -> None:
        """By SIGKILL, where one runs."""

    def process(self) -> psutil.Process:
        """That runs."""

    def said(self) -> str:
        """The end of its log."""


class OnMachine:
    """With all rights."""

    def __init__(self, ground: Ground, namespace: str, kubeconfig: Path, log: Path) -> None:
        self._ground, self._namespace, self._kubeconfig, self._log = ground, namespace, kubeconfig, log
        self._port, self._process = free_port("127.0.0.1"), None

    @property
    def metrics(self) -> str:
        """URL of what it says of itself."""
        return f"http://127.0.0.1:{self._port}/metrics"

    def start(self) -> None:
        command = [sys.executable, "-m", MODULE, "--namespace", self._namespace, "--fetch-image", self._ground.image]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        variables = {"KUBECONFIG": str(self._kubeconfig)} | named(mlflow_tracking_uri=self._ground.registry.url)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=for_child(variables))

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()

    def process(self) -> psutil.Process:
        assert self._process and self._process.poll() is None, self.said()
        return psutil.Process(self._process.pid)

    def said(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]


class InPod:
    """Its Deployment, ServiceAccount and Roles as the chart renders them; the kubelet starts again what was killed."""

    def __init__(self, ground: Ground, namespace: str, kubeconfig: Path, log: Path) -> None:
        self._ground, self._namespace, self._cluster = ground, namespace, Cluster(str(kubeconfig))

    def start(self) -> None:
        values = {
            "controller.enabled": True,
            "controller.gateway.name": "gateway",
            "images.controller": self._ground.image,
            "mlflow.mode": "external",
            "mlflow.uri": self._ground.registry.url,
        }
        sets = [f"{name}={json.dumps(value)}" for name, value in values.items()]
        made = template(sets=sets, namespace=self._namespace)
        assert made.returncode == 0, made.stderr
        found = [one for one in yaml.safe_load_all(made.stdout) if one and one["kind"] in KINDS]
        mine = [one for one in found if one["metadata"]["name"].startswith("nvila-controller")]
        given = yaml.safe_dump_all(mine)
        self._cluster.kubectl("apply", "--namespace", self._namespace, "--filename", "-", given=given)

    def kill(self) -> None:
        for process in self._processes():
            process.kill()

    def process(self) -> psutil.Process:
        return wait_for(self._processes, self.said())[0]

    def said(self) -> str:
        return self._cluster.kubectl("logs", "--namespace", self._namespace, "deployment/nvila-controller", check=False)

    def _processes(self) -> list[psutil.Process]:
        words = {MODULE, f"--namespace={self._namespace}"}
        return [one for one in psutil.process_iter(["cmdline"]) if words <= set(one.info["cmdline"] or [])]
