"""A step of the compiled pipeline as a pod under the restricted profile, on a node that has the image.

`NVILA_NODE_IMAGE` names the image; whoever starts the cluster has handed it to the node.
"""

import json
import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila.components.contracts.exits import Exit
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.pipelines.compile.package import compile_pipeline

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[3]
DEADLINE_SECONDS = 180
OUTPUT = "/nvila/kfp"


@pytest.fixture(scope="module")
def kubectl() -> list[str]:
    """The command, for a cluster whose node has the image."""
    for variable in ("KUBECONFIG", "NVILA_NODE_IMAGE"):
        if not os.environ.get(variable):
            pytest.skip(f"{variable} is not set")
    own = ROOT / ".tools/kubectl"
    found = str(own) if own.is_file() else shutil.which("kubectl")
    return [found] if found else pytest.skip("kubectl is not here: make tools")


@pytest.fixture(scope="module")
def namespace(kubectl: list[str]) -> Iterator[str]:
    """A namespace of its own."""
    name = f"nvila-image-{uuid.uuid4().hex[:8]}"
    subprocess.run([*kubectl, "create", "namespace", name], check=True)
    yield name
    subprocess.run([*kubectl, "delete", "namespace", name, "--wait=false"], check=True)


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The container of `resolve` in the compiled pipeline, command, arguments and environment."""
    path = tmp_path_factory.mktemp("compiled") / "lifecycle.yaml"
    compile_pipeline(path)
    spec = next(yaml.safe_load_all(path.read_text()))
    return spec["deploymentSpec"]["executors"]["exec-resolve"]["container"]


def test_a_step_runs_under_the_restricted_profile(
    kubectl: list[str], namespace: str, container: dict[str, Any]
) -> None:
    """A step that needs root, an account, a writable image or a privilege works on a laptop and on no cluster."""
    state, log = _run(kubectl, namespace, _pod("resolve", container, {}))
    assert state["exitCode"] == Exit.DONE, log
    manifest = json.loads(log[log.index("manifest:") :].partition(":")[2])
    assert manifest["step"] == "resolve" and manifest["result"]["slices"]["train-5"]
    recipe = fill_in(Form(recipe="micro"))
    assert manifest["result"]["slices"]["train-1"]["seed"] == recipe.seed


def test_a_step_that_refuses_its_input_ends_its_pod_with_2(
    kubectl: list[str], namespace: str, container: dict[str, Any]
) -> None:
    """The failure policies of jobs go by this number."""
    state, log = _run(kubectl, namespace, _pod("refused", container, {"evaluate": {"limitt": 1}}))
    assert (state["exitCode"], state["reason"]) == (Exit.USER, "Error") and "limitt" in log


def _pod(name: str, container: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The step with empty folders in place of the claims."""
    form = {"recipe": "micro", "data_uri": "", "model_name": "", "keep_ratio": 0.0, "target": ""}
    artifact = {"name": "slices", "type": {"schemaTitle": "system.Artifact"}, "uri": f"{OUTPUT}/slices"}
    executor_input = {
        "inputs": {"parameterValues": {"step": "resolve", "overrides": overrides, **form}},
        "outputs": {"artifacts": {"slices": {"artifacts": [artifact]}}, "outputFile": f"{OUTPUT}/output.json"},
    }
    given = json.dumps(executor_input)
    arguments = [part.replace("{{$}}", given) for part in container["args"]]
    # The first word is `sh`: what follows it runs, and what it wrote is shown.
    show = 'sh "$@" && echo manifest: && cat /nvila/kfp/slices'
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1234567,
            "runAsGroup": 0,
            "fsGroup": 1234567,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "main",
                "image": os.environ["NVILA_NODE_IMAGE"],
                "imagePullPolicy": "Never",
                "command": ["sh", "-c", show, *container["command"]],
                "args": arguments,
                "env": [{"name": "NVILA_RUN_ID", "value": "one"}, *container["env"]],
                "volumeMounts": [{"name": "nvila", "mountPath": "/nvila"}, {"name": "tmp", "mountPath": "/tmp"}],
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
        "volumes": [{"name": "nvila", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def _run(kubectl: list[str], namespace: str, pod: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """How the container ended, and its log."""
    command, name = [*kubectl, "--namespace", namespace], pod["metadata"]["name"]
    subprocess.run([*command, "create", "-f", "-"], input=json.dumps(pod), text=True, check=True)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        asked = subprocess.run([*command, "get", "pod", name, "-o", "json"], capture_output=True, text=True, check=True)
        status = json.loads(asked.stdout)["status"]
        if status["phase"] in ("Succeeded", "Failed"):
            log = subprocess.run([*command, "logs", name], capture_output=True, text=True, check=True).stdout
            ended = status["containerStatuses"][0]["state"]["terminated"]
            return ended, log or str(ended)
        time.sleep(0.5)
    raise AssertionError(f"the pod has not ended: {status}")
