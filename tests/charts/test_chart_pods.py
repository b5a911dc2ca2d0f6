"""What a site adds to pods, and its addresses: the values `pods`, `proxy`, `certificates`, and names of others."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from helming import EVERYTHING, Document, find, pod_specs, pod_templates, render

from nvila.components.contracts.site import CONFIG_MAP, Site
from nvila.pipelines.compile.names import CERTIFICATES, CERTIFICATES_MOUNT

ALL = {
    "nodeSelector": {"pool": "ml"},
    "tolerations": [{"key": "team", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    "priorityClassName": "ml",
    "runtimeClassName": "gvisor",
    "labels": {"cost-center": "a1"},
    "annotations": {"a.example/b": "1"},
    "env": {"PLAIN": "yes", "AWS_REGION": "here", "OF_SECRET": {"secretKeyRef": {"name": "a.b", "key": "c"}}},
    "volumes": {"/opt/corp": {"configMap": {"name": "corp"}, "readOnly": True}},
    "anyUser": True,
    "serviceAccountAnnotations": {"eks.amazonaws.com/role-arn": "arn"},
}


def _containers(pod: Document) -> list[Document]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


@pytest.fixture(scope="module")
def laid() -> list[Document]:
    return render(EVERYTHING, sets=[f"pods.all={json.dumps(ALL)}"])


def test_every_pod_takes_all_that_the_site_says_of_all(laid: list[Document]) -> None:
    """One workload that was forgotten stays Pending before a tainted node, or calls past the proxy."""
    seen = set()
    for document, template in pod_templates(laid):
        pod, metadata, where = template["spec"], template["metadata"], document["metadata"]["name"]
        seen.add(where)
        assert pod["nodeSelector"]["pool"] == "ml" and ALL["tolerations"][0] in pod["tolerations"], where
        assert "podAntiAffinity" in pod["affinity"] and pod["priorityClassName"] == "ml", where
        assert metadata["labels"]["cost-center"] == "a1" and metadata["annotations"]["a.example/b"] == "1", where
        (spread,) = [one for one in pod["topologySpreadConstraints"] if one["topologyKey"] == "zone"]
        assert spread["labelSelector"]["matchLabels"].items() <= metadata["labels"].items(), where
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(pod["securityContext"]), where
        for container in _containers(pod):
            variables = {one["name"]: one.get("value") for one in container["env"]}
            assert (variables["PLAIN"], variables["AWS_REGION"]) == ("yes", "here"), where
            assert variables["https_proxy"] == "http://proxy.corp.example:3128", where
            mounts = {one["mountPath"] for one in container["volumeMounts"]}
            assert {"/opt/corp", CERTIFICATES_MOUNT} <= mounts, where
            assert variables["SSL_CERT_FILE"].startswith(CERTIFICATES_MOUNT), where
    workloads = {"mlflow", "postgres", "backup", "warmup", "controller", "torch"}
    assert workloads <= {where.removeprefix("nvila-").split("-")[0] for where in seen} >= {"upload"}
    assert {"nvila-test-services", "nvila-test-locks"} <= seen
    accounts = [d for d in laid if d["kind"] == "ServiceAccount"]
    assert [d["metadata"]["name"] for d in accounts if "annotations" not in d["metadata"]] == []
    assert [d["metadata"]["namespace"] for d in laid if d["metadata"]["name"] == CERTIFICATES] == [
        "team-a", "team-b", "nvila",
    ]  # fmt: skip


def test_nothing_stands_twice_in_a_pod(laid: list[Document]) -> None:
    """The API server refuses a second variable, volume, mount or constraint of the same name."""
    for name, pod in pod_specs(laid):
        lists = [[v["name"] for v in pod["volumes"]]]
        lists += [[(c["topologyKey"], c["whenUnsatisfiable"]) for c in pod["topologySpreadConstraints"]]]
        for container in _containers(pod):
            lists += [[e["name"] for e in container["env"]], [m["mountPath"] for m in container["volumeMounts"]]]
            assert {m["name"] for m in container["volumeMounts"]} <= set(lists[0]), name
        assert [found for found in lists if len(found) != len(set(found))] == [], name


def test_a_workloads_own_block_is_laid_over_all() -> None:
    """Maps key by key, lists behind each other, and of anything else its own: a switch can be put back."""
    own = {
        "labels": {"more": "b"},
        "tolerations": [{"operator": "Exists"}],
        "priorityClassName": "high",
        "anyUser": False,
    }
    own["env"] = {"PLAIN": "no"}
    documents = render(EVERYTHING, sets=[f"pods.all={json.dumps(ALL)}", f"pods.mlflow={json.dumps(own)}"])
    template = find(documents, "Deployment", "nvila-mlflow")["spec"]["template"]
    pod = template["spec"]
    assert template["metadata"]["labels"].items() >= {"more": "b", "cost-center": "a1"}.items()
    assert pod["tolerations"][-2:] == [{"key": "team", "operator": "Exists"}, {"operator": "Exists"}]
    assert pod["priorityClassName"] == "high" and pod["securityContext"]["runAsUser"] == 65532
    assert {"name": "PLAIN", "value": "no"} in pod["containers"][0]["env"]
    backup = find(documents, "CronJob", "nvila-backup")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert backup["priorityClassName"] == "ml" and {"operator": "Exists"} not in backup["tolerations"]


def test_the_pods_of_a_run_get_what_KFP_takes() -> None:
    """Their nodes and variables come from the site's settings; a reference to a Secret would be read as its text."""
    documents = render(EVERYTHING, sets=[f"pods.all={json.dumps(ALL)}", 'pods.steps={"env":{"STEP":"1"}}'])
    site = Site.read(next(d["data"] for d in documents if d["metadata"]["name"] == CONFIG_MAP))
    assert site is not None and site.cpu_labels["pool"] == "ml" == site.gpu_labels["pool"]
    assert ALL["tolerations"][0] in site.cpu_tolerations and "nvidia.com/gpu.product" in site.gpu_labels
    assert [t["key"] for t in site.tolerations] == ["nvidia.com/gpu", "team"]
    said = site.environment
    assert (said["PLAIN"], said["STEP"], said["HTTP_PROXY"]) == ("yes", "1", "http://proxy.corp.example:3128")
    assert said["SSL_CERT_FILE"] == f"{CERTIFICATES_MOUNT}/ca.crt" and "OF_SECRET" not in said
    assert said["NO_PROXY"] == "127.0.0.1,localhost,::1,.svc,.cluster.local,.corp.example"


def test_another_pod_is_another_upload_job() -> None:
    """A Job's pod cannot be changed: the upgrade ended with `field is immutable`."""

    def name(*sets: str) -> str:
        return next(str(d["metadata"]["name"]) for d in render(sets=sets) if d["kind"] == "Job")

    assert name() == name() != name('pods.upload={"priorityClassName":"high"}')


@pytest.mark.parametrize(
    "sets",
    [
        ['mlflow.postgres={"mode":"external","host":"mlflow-prod","user":"mlflow@server","database":"mlflow-prod"}'],
        ['mlflow.postgres={"mode":"external","host":"fd00::5","secret":"postgres.mlflow"}'],
        ['s3.endpoint="https://minio.example:9000/"'],
        ['s3.endpoint="http://[fd00::7]:9000"', 'mlflow.allowedHosts=["[fd00::1]","[fd00::1]:8443"]'],
        ['images.pullSecrets=["registry.corp"]', "mlflow.auth.enabled=true", 'mlflow.auth.secret="a.b"'],
        ["trainer.cpu=96", "kueue.cpu=192", "controller.pods.cpu=8", "mlflow.resources.requests.cpu=0.5"],
        ["kueue.enabled=true", "gpu.tolerations=[]", 'kueue.topologyName="racks.a"', 'gpu.nodeLabels={"a":"b"}'],
    ],
)
def test_what_is_common_is_taken(sets: list[str]) -> None:
    """Each was refused, or rendered something that no pod could use."""
    documents = render(EVERYTHING, sets=sets)
    text = yaml.safe_dump_all(documents)
    assert "minio.example:9000/" not in text, "a key that begins with a slash is another"
    for _, pod in pod_specs(documents):
        for container in _containers(pod):
            amounts = [*container["resources"]["requests"].values(), *container["resources"]["limits"].values()]
            assert all(isinstance(amount, str) for amount in amounts)
    assert Site.read(next(d["data"] for d in documents if d["metadata"]["name"] == CONFIG_MAP)) is not None


def test_an_address_of_IPv6_is_no_service() -> None:
    """A policy that opens a namespace for it opens nothing that is needed."""
    policy = find(render(sets=['s3.endpoint="http://[fd00::7]:9000"']), "NetworkPolicy", "nvila-mlflow")
    rules = policy["spec"]["egress"]
    assert [rule for rule in rules if "ports" not in rule] == []
    assert {"ports": [{"protocol": "TCP", "port": 9000}]} in rules


def test_browsers_may_use_the_names_that_lead_to_mlflow() -> None:
    """MLflow answers 403 to a name that it was not told."""
    documents = render(EVERYTHING)
    container = find(documents, "Deployment", "nvila-mlflow")["spec"]["template"]["spec"]["containers"][0]
    (hosts,) = [a.partition("=")[2].split(",") for a in container["args"] if a.startswith("--allowed-hosts=")]
    ingress, route = find(documents, "Ingress", "nvila-mlflow"), find(documents, "HTTPRoute", "nvila-mlflow")
    names: list[Any] = [ingress["spec"]["rules"][0]["host"], *route["spec"]["hostnames"]]
    assert set(names) < set(hosts) and {"[$(POD_IP)]:5000", "[::1]:*"} < set(hosts)
    assert route["spec"]["parentRefs"] == [{"name": "public", "namespace": "gateways", "sectionName": "https"}]
