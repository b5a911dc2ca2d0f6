"""The chart's values: what is refused, and that every key is explained."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helming import APIS, CHART, EVERYTHING, EXAMPLES, find, helm, render, template

from nvila.components.contracts.environment import kept, name_of
from nvila.components.contracts.serving import Serving
from nvila.components.contracts.site import Site
from nvila.components.contracts.steps import STEPS
from nvila.pipelines.compile import names as site
from nvila.pipelines.show.chart import every_value, values_schema

SCHEMA = values_schema(CHART)
VALUES = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("imagse={}", "'imagse' not allowed"),
        ("trainer.ncl={}", "'ncl' not allowed"),
        ('images.base="two words"', "/images/base"),
        ('images.base="nvila/base@sha256:12"', "/images/base"),
        ('images.pullPolicy="Sometimes"', "/images/pullPolicy"),
        ('namespaces=["Team_A"]', "/namespaces/0"),
        ('namespaces=["a","a"]', "/namespaces"),
        ("stepServiceAccounts=[]", "/stepServiceAccounts"),
        ('s3.bucket="Bucket"', "/s3/bucket"),
        ('s3.endpoint="minio:9000"', "/s3/endpoint"),
        ('pipelines.mode="both"', "/pipelines/mode"),
        ('pipelines.host="ml-pipeline:8888"', "/pipelines/host"),
        ('mlflow.uri="https://user:password@mlflow.example"', "/mlflow/uri"),
        ('images.pullSecrets=["a","a"]', "/images/pullSecrets"),
        ('gpu.resource="gpu"', "/gpu/resource"),
        ("gpu.perNode=-1", "/gpu/perNode"),
        ('gpu.tolerations=[{"key":"a","operator":"Has"}]', "/gpu/tolerations/0/operator"),
        ('gpu.rdma.resource="rdma/ib"', "/gpu/rdma/perNode"),
        ('{"gpu":{"rdma":{"resource":"rdma/ib","perNode":8}},"kueue":{"enabled":true}}', "/kueue/rdma"),
        ('kueue={"enabled":true,"topologyName":"racks"}', "/gpu/nodeLabels"),
        ('storage.size="big"', "/storage/size"),
        ('cache.type="nfs"', "/cache/type"),
        ('cache.hostPath="/"', "/cache/hostPath"),
        ("cache.warmup.enabled=true", "/cache/warmup/weights"),
        ('cache.warmup.weights={"model":{"a":"b"}}', "/cache/warmup/weights"),
        ('cache.warmup.weights={"hf://a/b@c":{"model.safetensors":"123"}}', "model.safetensors"),
        ('pods.all.env={"NVILA_SITE":"{}"}', "invalid propertyName 'NVILA_SITE'"),
        ('pods.all.env={"PATH":"/"}', "invalid propertyName 'PATH'"),
        ('pods.training.env={"NCCL_IB_GID_INDEX":3}', "/pods/training/env/NCCL_IB_GID_INDEX"),
        ('pods.all.labels={"app.kubernetes.io/component":"a"}', "'app.kubernetes.io/component'"),
        ('pods.all.volumes={"/nvila":{"emptyDir":{}}}', "invalid propertyName '/nvila'"),
        ('pods.all.volumes={"/a":{"readOnly":true}}', "/pods/all/volumes"),
        ('pods.all.tolerations=[{"operator":"Equal"}]', "/pods/all/tolerations/0"),
        ('pods.steps={"priorityClassName":"high"}', "'priorityClassName' not allowed"),
        (
            'certificates.bundle="-----BEGIN CERTIFICATE-----\\nMII=\\n-----END CERTIFICATE-----"',
            "/certificates/bundle",
        ),
        ('proxy.url="http://user:password@proxy"', "/proxy/url"),
        ('mlflow.route.host="mlflow.example"', "/mlflow/route/gateway/name"),
        ('mlflow.mode="external"', "/mlflow/uri"),
        ('mlflow.postgres.mode="external"', "/mlflow/postgres/host"),
        ('mlflow.backup.schedule="daily"', "/mlflow/backup/schedule"),
        ("mlflow.replicas=0", "/mlflow/replicas"),
        ('mlflow={"mode":"external","uri":"https://mlflow.example","auth":{"enabled":true}}', "/mlflow/mode"),
        ('mlflow.auth.defaultPermission="ADMIN"', "/mlflow/auth/defaultPermission"),
        ("controller.enabled=true", "/controller/gateway/name"),
        ('controller={"enabled":true,"gateway":{"name":"a"}},mlflow.mode="none"', "/mlflow/mode"),
        ('controller.gateway.name="Public"', "/controller/gateway/name"),
        ('networkPolicies.media=["https"]', "/networkPolicies/media/0"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(setting: str, says: str) -> None:
    """A typing error that is passed over shows as a default that nobody asked for."""
    ran = template(sets=[setting])
    assert ran.returncode != 0
    assert says in ran.stderr


@pytest.mark.parametrize(
    "key", ["images.train", "s3.bucket", "mlflow.postgres", "monitoring", "networkPolicies.clients"]
)
def test_a_value_set_to_null_is_refused(key: str) -> None:
    """Helm takes null for `remove the default`: an image or a bucket without a name, or a template that breaks."""
    ran = template(sets=[f"{key}=null"])
    assert ran.returncode != 0 and f"missing property '{key.rpartition('.')[2]}'" in ran.stderr


def test_names_stay_text() -> None:
    """YAML reads 2024 as a number and null as nothing, and the API server refuses both half-way through."""
    sets = ['namespaces=["2024"]', 'mlflow.postgres.user="null"', 'stepServiceAccounts=["1"]', 's3.region="1e3"']
    documents = render(EVERYTHING, sets=sets)
    assert {d["metadata"]["namespace"] for d in documents if d["metadata"]["name"] == "nvila-launcher"} == {"2024"}
    assert find(documents, "RoleBinding", "nvila-launcher")["subjects"][0]["name"] == "1"
    postgres = find(documents, "StatefulSet", "nvila-postgres")["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "POSTGRES_USER", "value": "null"} in postgres["env"]
    store = yaml.safe_load(find(documents, "ConfigMap", "kfp-launcher")["data"]["providers"])["s3"]["default"]
    assert store["region"] == "1e3"


def test_the_chart_can_be_part_of_another(tmp_path: Path) -> None:
    """A chart of a site's own that names this one as a dependency: Helm hands it the key `global` beside its values."""
    about = f"apiVersion: v2\nname: site\nversion: 0.1.0\ndependencies: [{{name: {CHART.name}, version: '*'}}]\n"
    (tmp_path / "Chart.yaml").write_text(about, encoding="utf-8")
    (tmp_path / "charts").mkdir()
    (tmp_path / "charts" / CHART.name).symlink_to(CHART)
    ran = helm("template", "nvila", tmp_path, *(part for api in APIS for part in ("--api-versions", api)))
    assert ran.returncode == 0, ran.stderr


def test_one_made_volume_cannot_serve_two_namespaces() -> None:
    """The second claim would stay Pending for ever."""
    ran = template(sets=['storage.volumeName="nfs"', 'namespaces=["a","b"]'])
    assert ran.returncode != 0 and "/namespaces" in ran.stderr
    assert template(sets=['storage.volumeName="nfs"', 'namespaces=["a"]']).returncode == 0


def test_every_key_is_explained_and_no_other_is_taken() -> None:
    """The schema is the chart's reference; an open object takes typing errors."""
    parts = dict(every_value(SCHEMA, SCHEMA))
    assert [w for w, part in parts.items() if not w.endswith("[]") and len(part.get("description", "")) < 4] == []
    objects = {
        where: part
        for where, part in parts.items()
        if part.get("type") == "object" and not where.startswith((".global", ".extraObjects"))
    }
    assert [where for where, part in objects.items() if part.get("additionalProperties", True) is True] == []


def test_values_and_schema_have_the_same_keys() -> None:
    """A key of the schema without a default is found by nobody; one that the templates ask for would be nil."""

    def keys(values: Any, where: str = "") -> set[str]:
        if not isinstance(values, dict):
            return {where}
        return {where, *(k for name, value in values.items() for k in keys(value, f"{where}.{name}"))}

    free = (".cache.warmup.weights", ".gpu.nodeLabels", ".monitoring.labels", ".pods.", ".extraObjects", ".global")
    known = {where for where, _ in every_value(SCHEMA, SCHEMA) if "[]" not in where}
    assert {key for key in keys(VALUES) if not key.startswith(free)} == {k for k in known if not k.startswith(free)}


def test_a_run_can_ask_for_a_model_to_be_served() -> None:
    """The step `rollout` makes a ModelRollout of this; on a cluster without a controller it says that there is none."""

    def serving(*sets: str) -> Serving | None:
        documents = render(EVERYTHING, sets=sets)
        data = next(d["data"] for d in documents if d["metadata"]["name"] == site.CONFIG_MAP)
        found = Site.read(data)
        assert found is not None
        return None if found.serving is None else Serving.model_validate(found.serving)

    found = serving("controller.pods.gpus=2", 'controller.hostnames=["ai.example"]')
    assert found is not None and found.image == VALUES["images"]["serve"]
    assert (found.gateway.name, found.gateway.namespace, found.gateway.section_name) == ("public", "gateways", "https")
    assert found.hostnames == ["ai.example"] and (found.pods.gpus, found.pods.memory) == (2, "32Gi")
    assert found.pods.node_selector == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3", "pool": "ml"}
    assert found.pods.tolerations == [
        *VALUES["gpu"]["tolerations"],
        {"key": "team", "operator": "Equal", "value": "ml"},
    ]
    assert found.pods.priority_class_name == "ml"
    plain = serving('controller.gateway={"name":"public","namespace":"","sectionName":""}')
    assert plain is not None and plain.gateway.namespace is None
    assert serving("controller.enabled=false") is None


def test_no_value_is_a_secret() -> None:
    """What is a value ends up in the release's record and in somebody's repository."""
    names = [where for where, _ in every_value(SCHEMA, SCHEMA)]
    suspicious = ("password", "token", "accesskey", "secretkey", "apikey")
    assert [name for name in names if any(word in name.lower() for word in suspicious)] == []
    for values in ((), (EVERYTHING,), *((path,) for path in EXAMPLES)):
        assert [d["metadata"]["name"] for d in render(*values) if d["kind"] == "Secret"] == []


def test_the_names_are_those_of_the_compiled_pipeline() -> None:
    """A claim or a ConfigMap of another name leaves every pod of a run waiting, or without its settings."""
    documents = render(EVERYTHING)
    for namespace in ("team-a", "team-b"):
        mine = {(d["kind"], d["metadata"]["name"]) for d in documents if d["metadata"].get("namespace") == namespace}
        assert {("PersistentVolumeClaim", site.VOLUME_CLAIM), ("PersistentVolumeClaim", site.CACHE_CLAIM)} <= mine
        assert ("ConfigMap", site.CONFIG_MAP) in mine
    (config,) = [
        d for d in documents if d["metadata"].get("namespace") == "team-a" and d["metadata"]["name"] == site.CONFIG_MAP
    ]
    assert set(config["data"]) == set(kept("config"))
    assert set(json.loads(config["data"]["NVILA_SITE"])) == set(Site.model_fields)
    assert Site.notice(config["data"]) is None
    container = find(documents, "ClusterTrainingRuntime", "nvila-torch")["spec"]["template"]["spec"]["replicatedJobs"][
        0
    ]
    pod = container["template"]["spec"]["template"]["spec"]
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    claims = {
        v["persistentVolumeClaim"]["claimName"]: mounts[v["name"]]
        for v in pod["volumes"]
        if "persistentVolumeClaim" in v
    }
    assert claims == {site.VOLUME_CLAIM: site.MOUNT, site.CACHE_CLAIM: site.CACHE_MOUNT}
    assert pod["containers"][0]["envFrom"] == [{"configMapRef": {"name": site.CONFIG_MAP, "optional": True}}]
    keys = [entry["valueFrom"]["secretKeyRef"] for entry in pod["containers"][0]["env"] if "valueFrom" in entry]
    assert {key["key"] for key in keys} == {name_of(field) for row in STEPS if row.job for field in row.secrets}
    assert {(key["name"], key["optional"]) for key in keys} == {(site.SECRET, True)}
