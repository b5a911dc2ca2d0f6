"""Where the chart is installed by the tests: any `KUBECONFIG`, with the custom resources of the folder `NVILA_CRDS`.

`NVILA_KUBE_TOOLS` names a folder with `crd-downgrade.py` where the server is too old for them. `NVILA_NODE_IMAGE` and
`NVILA_POSTGRES_IMAGE` name images that the cluster's only node has, which must be this machine; without them nothing
that needs running pods is tested.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from helming import CHART, helm, tool

RELEASE = "nvila"
PASSWORD = "p@ss/w:rd %21"
"""With what an address would have to escape."""


@dataclass(frozen=True)
class Cluster:
    """kubectl and helm for one API server."""

    kubeconfig: str

    def kubectl(self, *arguments: str, given: str | None = None, check: bool = True) -> str:
        """Its standard output."""
        command = [tool("kubectl"), "--kubeconfig", self.kubeconfig, *arguments]
        ran = subprocess.run(command, input=given, capture_output=True, text=True)
        assert ran.returncode == 0 or not check, f"{' '.join(arguments)}: {ran.stderr}"
        return ran.stdout or ran.stderr

    def get(self, *arguments: str) -> Any:
        """`kubectl get`, parsed."""
        return json.loads(self.kubectl("get", "--output", "json", *arguments))

    def apply(self, *documents: Mapping[str, Any]) -> None:
        """Create or change them."""
        self.kubectl("apply", "--filename", "-", given=yaml.safe_dump_all(documents))

    def helm(self, *arguments: str | Path) -> str:
        """Its standard output; an error of helm's fails the test with what helm says."""
        ran = self.try_helm(*arguments)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    def try_helm(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """What helm said, whatever became of it."""
        return helm(*arguments, environment={"KUBECONFIG": self.kubeconfig})

    def ask(self, kind: str, version: str, spec: Mapping[str, Any]) -> Any:
        """The status of a review (of a token, of rights), which is answered and not kept."""
        review = yaml.safe_dump({"apiVersion": version, "kind": kind, "spec": spec})
        return json.loads(self.kubectl("create", "--filename", "-", "--output", "json", given=review))["status"]

    def address(self) -> str:
        """At which the node's pods reach this machine."""
        addresses = self.get("nodes")["items"][0]["status"]["addresses"]
        return str(next(item["address"] for item in addresses if item["type"] == "InternalIP"))

    def minor(self) -> int:
        """Of the server's version 1.x."""
        return int(json.loads(self.kubectl("version", "--output", "json"))["serverVersion"]["minor"].rstrip("+"))


@dataclass(frozen=True)
class Place:
    """A namespace with volumes for the chart's claims."""

    cluster: Cluster
    namespace: str
    folder: Path
    values: dict[str, Any]
    images: bool
    """Whether pods run here."""
    extra: list[str] = field(default_factory=list)

    def release(self, chart: Path = CHART, *more: str, seconds: int = 240, **changes: Any) -> str:
        """Install or upgrade with this place's values and more options; waits until all is ready where pods run."""
        values = self.folder / "values.yaml"
        values.write_text(yaml.safe_dump(merged(self.values, changes)), encoding="utf-8")
        wait = ["--wait", "--timeout", f"{seconds}s"] if self.images else []
        options = ["--install", "--namespace", self.namespace, "--values", values, *wait, *more]
        return self.cluster.helm("upgrade", RELEASE, chart, *options)

    def uninstall(self) -> None:
        """And wait until the objects are gone."""
        self.cluster.helm("uninstall", RELEASE, "--namespace", self.namespace, "--wait", "--timeout", "120s")
        pods = ["pod", "--selector", f"app.kubernetes.io/instance={RELEASE}", "--namespace", self.namespace]
        self.cluster.kubectl("wait", "--for=delete", *pods, "--timeout", "120s")


def connect(kubeconfig: str, crds: Path) -> Cluster:
    """The API server, with every custom resource of the folder that it does not have yet."""
    found = Cluster(kubeconfig)
    there = found.kubectl("get", "crd", "--output", "name")
    for path in sorted(crds.glob("*.yaml")):
        group, _, plural = path.stem.partition("_")
        if f"/{plural}.{group}\n" in there:
            continue
        text = path.read_text(encoding="utf-8")
        if tools := os.environ.get("NVILA_KUBE_TOOLS"):
            command = [sys.executable, str(Path(tools) / "crd-downgrade.py"), str(path)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.kubectl("create", "--filename", "-", given=text)
        _wait_for_definition(found, f"crd/{plural}.{group}")
    return found


def _wait_for_definition(cluster: Cluster, name: str) -> None:
    """`kubectl wait` fails at once while the object has no conditions at all: it is asked again."""
    arguments = ("wait", "--for", "condition=Established", name, "--timeout", "30s")
    for _ in range(30):
        if "condition met" in cluster.kubectl(*arguments, check=False):
            return
        time.sleep(1)
    cluster.kubectl(*arguments)


@contextmanager
def new_place(cluster: Cluster, *more: str, images: bool = False) -> Iterator[Place]:
    """A place, with further namespaces of these names; what is in it is removed afterwards."""
    # Not a temporary folder of pytest's: the pods' users must be able to walk to it.
    folder = Path("/tmp") / f"nvila-chart-{uuid.uuid4().hex[:8]}"
    place = Place(cluster, folder.name, folder, {}, images, [f"{folder.name}-{name}" for name in more])
    namespaces = (place.namespace, *place.extra)
    folder.mkdir(mode=0o755)
    try:
        for name in namespaces:
            cluster.kubectl("create", "namespace", name)
            _volume(place, name, "nvila", "ReadWriteMany", 65532)
        _volume(place, place.namespace, "nvila-postgres", "ReadWriteOnce", 999)
        _folder(folder / "cache", 65532)
        place.values.update(_values(place))
        password = f"--from-literal=password={PASSWORD}"
        cluster.kubectl("create", "secret", "generic", "nvila-postgres", "-n", place.namespace, password)
        yield place
    finally:
        cluster.try_helm("uninstall", RELEASE, "--namespace", place.namespace)
        for name in namespaces:
            cluster.kubectl("delete", "namespace", name, "--wait=false", check=False)
            cluster.kubectl("delete", "pv", "--selector", f"nvila-test={name}", "--wait=false", check=False)
        shutil.rmtree(folder, ignore_errors=True)


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """As helm lays one file of values over another."""
    result = dict(values)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def variable(name: str) -> str:
    """The variable's value; without it the test is skipped."""
    return os.environ.get(name) or pytest.skip(f"{name} is not set")


def _values(place: Place) -> dict[str, Any]:
    """Everything that the test cluster can hold, small."""
    node, postgres = os.environ.get("NVILA_NODE_IMAGE"), os.environ.get("NVILA_POSTGRES_IMAGE")
    images = {"base": node, "mlflow": node, "postgres": postgres}
    small = {"requests": {"cpu": "20m", "memory": "64Mi"}}
    return {
        "images": {"pullPolicy": "IfNotPresent", **({k: v for k, v in images.items() if v} if place.images else {})},
        "namespaces": place.extra,
        "pipelines": {"mode": "native"},
        "storage": {"size": "1Gi", "keep": False},
        "cache": {"hostPath": str(place.folder / "cache"), "size": "1Gi"},
        "kueue": {"enabled": True},
        "mlflow": {
            "workers": 1,
            "resources": small,
            "postgres": {"size": "1Gi", "keep": False, "resources": small},
            # No batch/v1 CronJob before 1.21.
            "backup": {"enabled": place.cluster.minor() >= 21},
        },
        "monitoring": {"serviceMonitor": True, "rules": True, "dashboard": True},
    }


def _volume(place: Place, namespace: str, claim: str, mode: str, user: int) -> None:
    """A folder of this machine as the volume of a claim: the test cluster has no storage class."""
    path = place.folder / namespace / claim
    _folder(path, user)
    spec = {
        "capacity": {"storage": "1Gi"},
        "accessModes": [mode],
        "storageClassName": "",
        "claimRef": {"namespace": namespace, "name": claim},
        "hostPath": {"path": str(path), "type": "DirectoryOrCreate"},
    }
    metadata = {"name": f"{namespace}-{claim}", "labels": {"nvila-test": namespace}}
    place.cluster.apply({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata, "spec": spec})


def _folder(path: Path, user: int) -> None:
    path.mkdir(parents=True)
    if os.getuid() == 0:
        os.chown(path, user, user)
