"""Runs helm on the chart for the tests of this folder, and reads what it renders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila.components.contracts.modelrollout import Spec
from nvila.infra.controller.objects import Owner, Platform, deployment
from nvila.infra.controller.seen import Registered

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "nvila-platform"
EXAMPLES = sorted((CHART / "examples").glob("values-*.yaml"))
EVERYTHING = Path(__file__).parent / "values-everything.yaml"
"""Every part switched on."""
APIS = (
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "jobset.x-k8s.io/v1alpha2/JobSet",
    "kueue.x-k8s.io/v1beta2/ClusterQueue",
    "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "pipelines.kubeflow.org/v2beta1/PipelineVersion",
    "trainer.kubeflow.org/v1alpha1/ClusterTrainingRuntime",
)
"""What a cluster with everything says it has."""
PYTHON_TOOLS = ROOT / ".tools" / "python"
if PYTHON_TOOLS.is_dir() and str(PYTHON_TOOLS) not in sys.path:
    sys.path.append(str(PYTHON_TOOLS))

Document = Mapping[str, Any]


def tool(name: str) -> str:
    """Path of a program of `make tools`; the test is skipped without it."""
    for path in (ROOT / ".tools" / name, PYTHON_TOOLS / "bin" / name):
        if path.is_file():
            return str(path)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here: make tools")
    return found


def helm(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run helm without a cluster, unless `environment` names one."""
    command = [tool("helm"), *map(str, arguments)]
    offline = {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
    return subprocess.run(command, capture_output=True, text=True, env={**offline, **(environment or {})})


def template(
    *values: Path,
    sets: Sequence[str] = (),
    apis: Sequence[str] = APIS,
    namespace: str = "nvila",
    chart: Path = CHART,
) -> subprocess.CompletedProcess[str]:
    """`helm template` of the chart with these value files and settings, for a cluster with these APIs."""
    options = [part for path in values for part in ("--values", str(path))]
    options += [part for item in sets for part in ("--set-json", item)]
    options += [part for api in apis for part in ("--api-versions", api)]
    return helm("template", "nvila", chart, "--namespace", namespace, *options)


def render(*values: Path, sets: Sequence[str] = (), apis: Sequence[str] = APIS, chart: Path = CHART) -> list[Document]:
    """The resources, with the release's namespace where a document names none."""
    ran = template(*values, sets=sets, apis=apis, chart=chart)
    assert ran.returncode == 0, ran.stderr
    return [document for document in yaml.load_all(ran.stdout, yaml.CSafeLoader) if document]


def find(documents: Sequence[Document], kind: str, name: str) -> Document:
    """The only document of that kind and name."""
    (found,) = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def pod_templates(documents: Sequence[Document]) -> Iterator[tuple[Document, Document]]:
    """Everything that becomes a pod, the training runtime's among them, with the pod's template."""
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
            yield document, spec["template"]
        elif document["kind"] == "Pod":
            yield document, document
        elif document["kind"] == "CronJob":
            yield document, spec["jobTemplate"]["spec"]["template"]
        elif document["kind"] == "ClusterTrainingRuntime":
            for job in spec["template"]["spec"]["replicatedJobs"]:
                yield document, job["template"]["spec"]["template"]
        else:
            assert "template" not in spec, f"{document['kind']} may become pods, and no test looks at them"


def pod_specs(documents: Sequence[Document]) -> Iterator[tuple[str, Document]]:
    """Name and pod specification of everything that becomes a pod."""
    for document, template in pod_templates(documents):
        yield f"{document['kind']}/{document['metadata']['name']}", template["spec"]


def serving_pod(namespace: str) -> Document:
    """The template of the pods that the controller makes for a version."""
    spec = Spec.model_validate({"model": "m", "image": "serve:1", "gateway": {"name": "public"}})
    version = Registered(model="m", version="7", digest="d")
    made = deployment(Owner("m", namespace, "uid"), spec, version, Platform("controller:1"))
    return dict(made["spec"]["template"])
