"""Rights and pods of the chart, rule by rule, and what trivy finds in it."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helming import APIS, CHART, EVERYTHING, EXAMPLES, Document, find, pod_specs, render, serving_pod, template, tool

CASES = [(), (EVERYTHING,), *((path,) for path in EXAMPLES)]
SECCOMP = ("RuntimeDefault", "Localhost")
VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip


def restricted(pod: Document) -> Iterator[str]:
    """Breaches of the Pod Security profile `restricted`, which contains `baseline`."""
    yield from (key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key))
    yield from (f"volume {set(v) - {'name'}}" for v in pod.get("volumes", []) if not set(v) - {"name"} <= VOLUMES)
    own: Any = pod.get("securityContext", {})
    yield from _identity(own, "pod")
    if own.get("sysctls"):
        yield "sysctls"
    for container in (*pod.get("initContainers", ()), *pod["containers"], *pod.get("ephemeralContainers", ())):
        security: Any = container.get("securityContext", {})
        name = container["name"]
        yield from _identity(security, name)
        if security.get("privileged"):
            yield f"{name}: privileged"
        if security.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: allowPrivilegeEscalation"
        if "ALL" not in security.get("capabilities", {}).get("drop", ()):
            yield f"{name}: capabilities are kept"
        if set(security.get("capabilities", {}).get("add", ())) - {"NET_BIND_SERVICE"}:
            yield f"{name}: capabilities are added"
        if security.get("procMount", "Default") != "Default":
            yield f"{name}: procMount"
        if security.get("runAsNonRoot", own.get("runAsNonRoot")) is not True:
            yield f"{name}: may be root"
        if security.get("seccompProfile", own.get("seccompProfile", {})).get("type") not in SECCOMP:
            yield f"{name}: seccompProfile"
        if any(port.get("hostPort") for port in container.get("ports", ())):
            yield f"{name}: hostPort"
        for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
            if any(part.get("host") for part in container.get(probe, {}).values() if isinstance(part, dict)):
                yield f"{name}: {probe} names a host"


def _identity(security: Document, name: str) -> Iterator[str]:
    """Rules that hold for a pod's and for a container's settings alike."""
    if security.get("runAsUser") == 0:
        yield f"{name}: runAsUser 0"
    if security.get("runAsNonRoot") is False:
        yield f"{name}: runAsNonRoot false"
    if security.get("windowsOptions", {}).get("hostProcess"):
        yield f"{name}: hostProcess"
    allowed = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
    selinux = security.get("seLinuxOptions", {})
    if selinux.get("type", "") not in allowed or selinux.get("user") or selinux.get("role"):
        yield f"{name}: seLinuxOptions"
    if security.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in SECCOMP:
        yield f"{name}: appArmorProfile"
    if security.get("seccompProfile", {}).get("type", "RuntimeDefault") not in SECCOMP:
        yield f"{name}: seccompProfile is unconfined"


@pytest.mark.parametrize("values", CASES, ids=lambda case: case[0].stem if case else "default")
def test_every_pod_is_restricted(values: tuple[Path, ...]) -> None:
    """A namespace with that profile refuses other pods; a Deployment then has no pods and only an event says so."""
    pods = dict(pod_specs(render(*values))) | {"serving": serving_pod("nvila")["spec"]}
    assert {name: list(restricted(pod)) for name, pod in pods.items()} == {name: [] for name in pods}
    assert len(pods) >= 4


def _sound() -> dict[str, Any]:
    return {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {"name": "a", "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
    }


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("hostNetwork",), True),
        (("hostPID",), True),
        (("hostIPC",), True),
        (("volumes", 0), {"name": "disk", "hostPath": {"path": "/"}}),
        (("securityContext", "runAsUser"), 0),
        (("securityContext", "runAsNonRoot"), False),
        (("securityContext", "sysctls"), [{"name": "kernel.shm_rmid_forced", "value": "1"}]),
        (("securityContext", "seccompProfile"), {"type": "Unconfined"}),
        (("securityContext", "seLinuxOptions"), {"type": "spc_t"}),
        (("securityContext", "appArmorProfile"), {"type": "Unconfined"}),
        (("securityContext", "windowsOptions"), {"hostProcess": True}),
        (("containers", 0, "securityContext", "privileged"), True),
        (("containers", 0, "securityContext", "allowPrivilegeEscalation"), True),
        (("containers", 0, "securityContext", "capabilities"), {"drop": ["NET_RAW"]}),
        (("containers", 0, "securityContext", "capabilities"), {"drop": ["ALL"], "add": ["SYS_ADMIN"]}),
        (("containers", 0, "securityContext", "procMount"), "Unmasked"),
        (("containers", 0, "securityContext", "runAsUser"), 0),
        (("containers", 0, "ports"), [{"containerPort": 80, "hostPort": 80}]),
        (("containers", 0, "livenessProbe"), {"httpGet": {"host": "169.254.169.254", "port": 80}}),
    ],
)
def test_each_rule_of_the_profile_is_looked_at(where: tuple[Any, ...], value: Any) -> None:
    """A rule that is never broken in the chart could be missing from the check above."""
    assert list(restricted(_sound())) == []
    pod = _sound()
    place: Any = pod
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    assert len(list(restricted(pod))) >= 1


@pytest.mark.parametrize("values", CASES, ids=lambda case: case[0].stem if case else "default")
def test_containers_are_read_only_limited_and_without_a_token(values: tuple[Path, ...]) -> None:
    """Beyond `restricted`: a program changed at run time, a leak that takes the node, a stolen identity."""
    for name, pod in pod_specs(render(*values)):
        assert pod["automountServiceAccountToken"] is (name == "Deployment/nvila-controller"), name
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][kind]), name


LOOK = ("get", "list", "watch")
KEEP = ("list", "create", "patch", "delete")
RIGHTS = {
    # of the pods of a run
    "nvila-launcher": {
        "trainjobs": (*LOOK, "create", "patch", "delete"),
        "pods": LOOK,
        "pods/log": LOOK,
        "events": ("list",),
        "workloads": ("list",),
    },
    "nvila-rollout": {
        "modelrollouts": ("get", "list", "create"),
        "gateways": ("get",),
        "resourcequotas": ("list",),
        "pods": ("list",),
    },
    "nvila-upload": {"pipelines": ("create", "get", "list"), "pipelines/versions": ("create", "get", "list")},
    "nvila-controller": {
        "modelrollouts": ("list",),
        "modelrollouts/status": ("update",),
        "deployments": KEEP,
        "services": KEEP,
        "httproutes": KEEP,
        "pods": ("list",),
        "events": ("create",),
    },
    "nvila-controller-lease": {"leases": ("create", "get", "patch")},
}
"""By role. Whoever may write a ModelRollout's spec may skip its steps: that is people's."""


def test_rights_are_few_and_named() -> None:
    """A wildcard or a right on Secrets makes every run's pod an administrator of its namespace."""
    documents = render(EVERYTHING)
    kinds = {d["kind"] for d in documents}
    assert not kinds & {"ClusterRole", "ClusterRoleBinding"}
    found: dict[str, dict[str, set[str]]] = {}
    for role in (d for d in documents if d["kind"] == "Role"):
        for rule in role["rules"]:
            for resource in rule["resources"]:
                found.setdefault(role["metadata"]["name"], {}).setdefault(resource, set()).update(rule["verbs"])
    assert found == {role: {name: set(verbs) for name, verbs in rights.items()} for role, rights in RIGHTS.items()}
    leases = find(documents, "Role", "nvila-controller-lease")["rules"]
    assert [rule.get("resourceNames") for rule in leases] == [None, ["nvila-controller"]]
    assert leases[0]["verbs"] == ["create"]


def test_the_controller_has_rights_where_models_are_served() -> None:
    """A role in the namespace of the release alone, and each round of the controller is refused."""
    documents = render(EVERYTHING)
    found = {(d["metadata"]["name"], d["metadata"]["namespace"]): d for d in documents if d["kind"] == "RoleBinding"}
    for team in ("team-a", "team-b"):
        (account,) = found["nvila-controller", team]["subjects"]
        assert account == {"kind": "ServiceAccount", "name": "nvila-controller", "namespace": "nvila"}
        accounts = found["nvila-rollout", team]["subjects"]
        assert {(a["name"], a["namespace"]) for a in accounts} == {
            ("pipeline-runner", team),
            ("default-editor", team),
        }
    assert ("nvila-controller-lease", "nvila") in found
    assert "nvila" not in {place for role, place in found if role == "nvila-controller"}


def test_trivy_finds_nothing_high(tmp_path: Path) -> None:
    """The scan that a platform team runs before it takes a chart."""
    trivy = tool("trivy")
    rendered = tmp_path / "everything.yaml"
    rendered.write_text(template(EVERYTHING).stdout, encoding="utf-8")
    command = [trivy, "config", "--skip-check-update", "--skip-version-check", "--quiet", "--format", "json"]
    for target in (str(rendered), str(CHART)):
        more = [part for api in APIS for part in ("--helm-api-versions", api)]
        ran = subprocess.run([*command, *more, target], capture_output=True, text=True, check=True)
        results = json.loads(ran.stdout).get("Results", [])
        found = [m for r in results for m in r.get("Misconfigurations", []) if m["Severity"] in ("HIGH", "CRITICAL")]
        # It makes Services: that is its work.
        others = [m for m in found if (m["ID"], "'nvila-controller'" in m["Message"]) != ("KSV-0056", True)]
        assert results and others == []


@pytest.mark.parametrize("policy", ["nvila-mlflow", "nvila-backup", "nvila-warmup"])
def test_pods_reach_the_store_behind_a_service(policy: str) -> None:
    """A policy is held against the pod's port (8333 of SeaweedFS), not the service's (9000): uploads would hang."""

    def namespaces(endpoint: str) -> list[str]:
        documents = render(EVERYTHING, sets=[f's3.endpoint="{endpoint}"'])
        rules = find(documents, "NetworkPolicy", policy)["spec"]["egress"]
        peers = [to["namespaceSelector"]["matchLabels"] for r in rules if "ports" not in r for to in r["to"]]
        return [labels["kubernetes.io/metadata.name"] for labels in peers]

    assert namespaces("http://seaweedfs.kubeflow.svc.cluster.local:9000") == ["kubeflow"]
    assert namespaces("http://seaweedfs.kubeflow.svc:9000") == ["kubeflow"]
    assert namespaces("http://seaweedfs.kubeflow:9000") == ["kubeflow"]
    assert namespaces("http://seaweedfs:9000") == ["nvila"]
    assert namespaces("https://svc.example.svc-1.org") == namespaces("http://10.0.0.1:9000") == []
