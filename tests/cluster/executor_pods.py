"""Runs executors of a compiled pipeline as pods, as KFP's launcher and Argo make them; a `Place` of the interpreter."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from interpreter import Call

from nvila.components.kube.cluster import POD, Cluster
from nvila.components.kube.requests import Requests

RUN_LABEL = "pipeline/runid"
"""Of KFP's, on every pod of a run."""
INIT = """trap 'trap "" TERM; kill -TERM 0; sleep 1; exit 143' TERM; "$@" > "$0" 2>&1 & wait $!"""
"""The container's first process. Argo's passes SIGTERM to the whole group; KFP's launcher, which does not know the
signal, ends at once, so Argo's does, and with it the container: what runs has about a second."""
BEGIN_SECONDS = 600
"""A pod may wait that long for those beside it to end."""
_KNOWN = {
    "activeDeadlineSeconds",
    "configMapAsEnv",
    "configMapAsVolume",
    "emptyDirMounts",
    "fieldPathAsEnv",
    "nodeSelector",
    "podMetadata",
    "pvcMount",
    "secretAsEnv",
    "tolerations",
}


@dataclass
class Pods:
    """The pods of one run."""

    cluster: Cluster
    requests: Requests
    run: str
    shared: Path
    """Folder of this machine, the node, that every pod finds at the same path: in place of KFP's object store."""
    account: str

    def start(self, call: Call) -> Callable[[], int]:
        """Make the pod; its output goes to a file in the call's folder."""
        name = f"{self.run}-{call.task}-{call.attempt}"
        call.folder.mkdir(exist_ok=True)
        call.folder.chmod(0o777)
        self.cluster.create(POD, pod(call, name, self.run, self.shared, self.account))
        return lambda: self._exit_code(name)

    def stop(self) -> None:
        """Delete them, with their grace period."""
        for found in self.cluster.find(POD, labels=f"{RUN_LABEL}={self.run}"):
            if found["status"].get("phase") in ("Pending", "Running"):
                self.requests.ask("DELETE", self.cluster.path(POD, found["metadata"]["name"]))

    def _exit_code(self, name: str) -> int:
        """Of the pod's container, once it has ended; 143 where the pod was deleted and has gone."""
        deadline = time.monotonic() + BEGIN_SECONDS
        while found := self.cluster.get(POD, name):
            waits = found["status"].get("phase") == "Pending" and time.monotonic() > deadline
            assert not waits, f"{name} does not begin: {found['status']}"
            for state in found["status"].get("containerStatuses", []):
                if (ended := state["state"].get("terminated")) and "deletionTimestamp" not in found["metadata"]:
                    return int(ended["exitCode"])
                why = state["state"].get("waiting", {}).get("reason", "")
                assert why in ("", "ContainerCreating"), f"{name}: {state}"
            assert found["status"].get("phase") != "Failed" or found["status"].get("containerStatuses"), found["status"]
            time.sleep(0.2)
        return 143


def pod(call: Call, name: str, run: str, shared: Path, account: str) -> dict[str, Any]:
    """What is made of an executor and its part of the platform's specification."""
    container, more = call.container, call.kubernetes
    assert more.keys() <= _KNOWN, f"{call.task}: {more.keys() - _KNOWN} is not known here"
    environment = list(container.get("env", []))
    for one in more.get("fieldPathAsEnv", []):
        environment.append({"name": one["name"], "valueFrom": {"fieldRef": {"fieldPath": one["fieldPath"]}}})
    for kind, key in (("configMap", "configMapKey"), ("secret", "secretKey")):
        for one in more.get(f"{kind}AsEnv", []):
            optional = one.get("optional", False)
            for pair in one["keyToEnv"]:
                read = {"name": one[f"{kind}NameParameter"], "key": pair[key], "optional": optional}
                environment.append({"name": pair["envVar"], "valueFrom": {f"{kind}KeyRef": read}})
    places = [("shared", {"hostPath": {"path": str(shared)}}, str(shared))]
    for one in more.get("pvcMount", []):
        claim = one["pvcNameParameter"]
        places.append((claim, {"persistentVolumeClaim": {"claimName": claim}}, one["mountPath"]))
    for one in more.get("configMapAsVolume", []):
        read = {"name": one["configMapNameParameter"], "optional": one.get("optional", False)}
        places.append((read["name"], {"configMap": read}, one["mountPath"]))
    for one in more.get("emptyDirMounts", []):
        places.append((one["volumeName"], {"emptyDir": {"medium": one.get("medium", "")}}, one["mountPath"]))
    asked = container["resources"]
    gpus = {one["resourceType"]: one["resourceCount"] for one in [asked.get("accelerator")] if one}
    gpus = {kind: count for kind, count in gpus.items() if count != "0"}
    main = {
        "name": "main",
        "image": container["image"],
        "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", INIT, str(call.folder / f"{call.attempt}.log"), *container["command"]],
        "args": container["args"],
        "env": environment,
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, _, path in places],
        "resources": {
            "requests": {"cpu": asked["resourceCpuRequest"], "memory": asked["resourceMemoryRequest"]},
            "limits": {"cpu": asked["resourceCpuLimit"], "memory": asked["resourceMemoryLimit"]} | gpus,
        },
    }
    told = more.get("podMetadata", {})
    metadata = {"name": name, "labels": told.get("labels", {}) | {RUN_LABEL: run}}
    spec = {
        "restartPolicy": "Never",
        "serviceAccountName": account,
        "containers": [main],
        "volumes": [{"name": volume, **source} for volume, source, _ in places],
        "nodeSelector": more.get("nodeSelector", {}).get("nodeSelectorJson", {}),
        "tolerations": [one for said in more.get("tolerations", []) for one in said["tolerationJson"]],
    }
    if "activeDeadlineSeconds" in more:
        spec["activeDeadlineSeconds"] = int(more["activeDeadlineSeconds"])
    return {"metadata": metadata | {"annotations": told.get("annotations", {})}, "spec": spec}
