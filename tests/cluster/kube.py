"""Helpers of the cluster tests: waiting, custom resources, kubeconfigs, and an API server that may be stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvila.components.kube.errors import NotThere
from nvila.components.kube.requests import MERGE, Requests

CRDS = ("trainer.kubeflow.org_trainjobs", "trainer.kubeflow.org_clustertrainingruntimes")
"""What the launcher deals with."""


def wait_for(there: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """What `there` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := there()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


class ApiServer:
    """The API server of this machine's test cluster, which may be stopped and started."""

    def __init__(self, tools: Path, state: Path) -> None:
        self._tools, self._state = tools, state

    @property
    def pid(self) -> int:
        """Of the running process."""
        return int((self._state / "pid" / "kube-apiserver").read_text().split()[0])

    def kill(self) -> None:
        """End it at once, in the middle of whatever it is doing."""
        pid = self.pid
        os.kill(pid, 9)
        wait_for(lambda: _has_ended(pid), "the API server lives on")

    def start(self) -> None:
        """Start it again; its data is still there."""
        environment = os.environ | {"KUBE_STATE": str(self._state)}
        subprocess.run([self._tools / "up.sh"], env=environment, check=True, capture_output=True, timeout=120)


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def install_crd(admin: Requests, path: Path) -> None:
    """Create a custom resource definition that is not there yet, and wait until it is served."""
    import yaml

    text = path.read_text()
    if tools := os.environ.get("NVILA_KUBE_TOOLS"):
        command = [sys.executable, str(Path(tools, "crd-downgrade.py")), str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    body = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    at = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    name, spec = body["metadata"]["name"], body["spec"]
    try:
        admin.ask("GET", f"{at}/{name}")
    except NotThere:
        crd = {"apiVersion": body["apiVersion"], "kind": body["kind"], "metadata": {"name": name}, "spec": spec}
        admin.ask("POST", at, body=crd)
    wait_for(
        lambda: any(
            c["type"] == "Established" and c["status"] == "True"
            for c in admin.ask("GET", f"{at}/{name}")["status"].get("conditions") or []
        ),
        f"{name} is not served",
    )


def write_kubeconfig(source: Path, target: Path, namespace: str, token: str | None = None) -> Path:
    """A copy whose current context works in `namespace`, as the holder of `token` where one is given."""
    import yaml

    content = yaml.safe_load(source.read_text())
    current = next(c for c in content["contexts"] if c["name"] == content["current-context"])["context"]
    current["namespace"] = namespace
    if token:
        content["users"].append({"name": "bearer", "user": {"token": token}})
        current["user"] = "bearer"
    target.write_text(yaml.safe_dump(content))
    target.chmod(0o600)
    return target


def service_account(admin: Requests, namespace: str, name: str, rules: list[dict[str, Any]]) -> str:
    """A service account that may do what `rules` say; returns a token of it."""
    core, rbac = f"/api/v1/namespaces/{namespace}", f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    admin.ask("POST", f"{core}/serviceaccounts", body={"metadata": {"name": name}})
    admin.ask("POST", f"{rbac}/roles", body={"metadata": {"name": name}, "rules": rules})
    subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    admin.ask(
        "POST", f"{rbac}/rolebindings", body={"metadata": {"name": name}, "subjects": [subject], "roleRef": reference}
    )
    answer = admin.ask("POST", f"{core}/serviceaccounts/{name}/token", body={"spec": {}})
    return str(answer["status"]["token"])


def default_account(admin: Requests, namespace: str) -> None:
    """Wait until pods can be made in a new namespace."""
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    wait_for(
        lambda: any(account["metadata"]["name"] == "default" for account in admin.ask("GET", path)["items"]),
        "the namespace has no service account",
    )


def write_status(admin: Requests, namespace: str, name: str, *conditions: str, message: str = "by hand") -> None:
    """What Kubeflow Trainer would write of a job: conditions that hold, or with `!` in front do not."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rows = [
        {"type": kind.lstrip("!"), "status": "False" if kind[0] == "!" else "True", "reason": "Test"}
        | {"message": message, "lastTransitionTime": now}
        for kind in conditions
    ]
    path = f"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{namespace}/trainjobs/{name}/status"
    admin.ask("PATCH", path, body={"status": {"conditions": rows}}, form=MERGE)
