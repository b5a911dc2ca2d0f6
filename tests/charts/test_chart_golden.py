"""What the chart renders. `make golden` writes tests/golden/chart-*.yaml anew."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from helming import APIS, CHART, EVERYTHING, EXAMPLES, find, helm, render, template
from typer.main import get_command

from nvila.components.contracts.environment import Environment, kept
from nvila.components.contracts.modelrollout import GROUP, PLURAL
from nvila.components.contracts.pipelines import PIPELINES, PipelineName
from nvila.components.contracts.site import Site
from nvila.components.runner.image import IMAGE, QUANTIZE_IMAGE
from nvila.infra.controller import __main__ as program
from nvila.infra.controller.crd import definition
from nvila.pipelines.cli import app
from nvila.pipelines.compile.names import SECRET
from nvila.pipelines.compile.package import compiled, resource_name

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {"default": None, **{path.stem.removeprefix("values-"): path for path in EXAMPLES}}


def _without_the_files(rendered: str) -> str:
    """The compiled pipeline and the definition have files of their own, whose text would drown everything else."""
    rendered = re.sub(r"(\nkind: CustomResourceDefinition\n(?:.*\n)*?spec:\n)(?:  .*\n)+", r"\1  (files/)\n", rendered)
    rendered = re.sub(r"(\n  pipelineSpec:\n)(?:    .*\n|\n|  platformSpec:\n)+", r"\1    (files/)\n", rendered)
    return re.sub(r"(nvila-(?:upload|lifecycle|finetune)-)[0-9a-f]{12}\b", r"\1DIGEST", rendered)


@pytest.mark.parametrize("case", CASES)
def test_render_is_the_golden_one(case: str) -> None:
    """A changed template changes what runs on every cluster; the diff of the golden file shows it."""
    ran = template(*filter(None, [CASES[case]]))
    assert ran.returncode == 0, ran.stderr
    path = GOLDEN / f"chart-{case}.yaml"
    rendered = _without_the_files(ran.stdout)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(rendered, encoding="utf-8")
    assert rendered == path.read_text(encoding="utf-8"), "`make golden`, then look at the diff"


@pytest.mark.parametrize("values", [None, *EXAMPLES], ids=lambda path: path.stem if path else "default")
def test_lint_finds_nothing(values: Path | None) -> None:
    """What lint warns about, some chart repository or Helm version refuses."""
    ran = helm("lint", "--strict", CHART, *(["--values", values] if values else []))
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("name", PIPELINES)
def test_the_native_pipeline_is_the_compiled_one(name: PipelineName) -> None:
    """The template cuts it out as text; a lost line or a number turned to a float would show first in a failed run."""
    images = {"base": "registry.example/base:1", "quantize": "registry.example/nvila-python:0.1.0-cuda"}
    sets = [f'images.{key}="{image}"' for key, image in images.items()]
    documents = render(sets=[*sets, 'pipelines.mode="native"'])
    pipeline, called = find(documents, "Pipeline", resource_name(name)), resource_name(name)
    (version,) = [d for d in documents if d["kind"] == "PipelineVersion" and d["spec"]["pipelineName"] == called]
    spec, platform = compiled(pipeline=name)
    assert pipeline["spec"]["description"] == spec["pipelineInfo"]["description"]
    rendered = [version["spec"]["pipelineSpec"], version["spec"]["platformSpec"]]
    wanted = json.dumps([spec, platform])
    for placeholder, image in ((QUANTIZE_IMAGE, images["quantize"]), (IMAGE, images["base"])):
        wanted = wanted.replace(f'"{placeholder}"', f'"{image}"')
    assert rendered == json.loads(wanted)


def test_each_namespace_has_its_native_pipeline() -> None:
    """Without a database KFP lists the pipelines of one namespace: a team without its own sees none."""

    def namespaces(*sets: str) -> list[tuple[str, str]]:
        documents = render(sets=['pipelines.mode="native"', *sets])
        return [(d["kind"], d["metadata"]["namespace"]) for d in documents if d["kind"].startswith("Pipeline")]

    kinds = ("Pipeline", "PipelineVersion")
    both = len(PIPELINES)
    assert sorted(namespaces()) == sorted([(kind, "nvila") for kind in kinds] * both)
    teams = 'namespaces=["team-a","team-b"]'
    assert sorted(namespaces(teams)) == sorted([(kind, f"team-{x}") for kind in kinds for x in "ab"] * both)
    assert sorted(namespaces(teams, 'pipelines.namespace="shared"')) == sorted([(k, "shared") for k in kinds] * both)


def test_the_upload_is_a_command_that_exists() -> None:
    """The Job's arguments are written by hand; an option of another name fails in the pod, after the install."""
    job = next(d for d in render(sets=['pipelines.namespace="team-a"']) if d["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    program, name, *options = [*container["command"], *container["args"]]
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    context = command.make_context(name, options)
    assert program == "nvila" and context.params["upload_only"]
    images = (context.params["image"], context.params["quantize_image"])
    assert images == ("localhost/nvila/base:0.1.0", "localhost/nvila/quantize:0.1.0")
    assert context.params["namespace"] == "team-a"
    mounts = [Path(mount["mountPath"]) for mount in container["volumeMounts"]]
    assert context.params["token_file"].parent in mounts


def test_the_controller_is_started_with_options_that_it_has() -> None:
    """They are written by hand here too; and a Lease of another name is one that it has no right to."""
    documents = render(EVERYTHING)
    (container,) = find(documents, "Deployment", "nvila-controller")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", program.__spec__.parent]
    asked = program._parser().parse_args(container["args"])
    assert (asked.namespace, asked.lease_namespace) == (["team-a", "team-b"], "nvila")
    assert (asked.fetch_image, asked.pull_policy) == (container["image"], "IfNotPresent")
    assert (asked.pull_secret, asked.port) == (["registry"], container["ports"][0]["containerPort"])
    (named,) = [r for r in find(documents, "Role", "nvila-controller-lease")["rules"] if "resourceNames" in r]
    assert named["resourceNames"] == [program.LEASE]
    known = {str(field.alias) for field in Environment.model_fields.values()}
    plain = find(
        render(sets=['controller={"enabled":true,"gateway":{"name":"public"}}']), "Deployment", "nvila-controller"
    )["spec"]["template"]["spec"]["containers"][0]
    assert {one["name"] for one in plain["env"]} <= known


def test_another_image_is_another_version() -> None:
    """Under an old name KFP would refuse the new version, or keep the old images."""

    def names(image: str, mode: str) -> set[str]:
        documents = render(sets=[f'images.quantize="{image}"', f'pipelines.mode="{mode}"'])
        return {d["metadata"]["name"] for d in documents if d["kind"] in ("Job", "PipelineVersion")}

    for mode in ("native", "upload"):
        assert names("a:1", mode) == names("a:1", mode) != names("a:2", mode)


@pytest.mark.parametrize(
    ("sets", "missing", "remedy"),
    [
        ([], "trainer.kubeflow.org/v1alpha1/ClusterTrainingRuntime", "trainer.enabled=false"),
        (['pipelines.mode="native"'], "pipelines.kubeflow.org/v2beta1/PipelineVersion", "pipelines.mode=upload"),
        (["kueue.enabled=true"], "kueue.x-k8s.io/v1beta1/ClusterQueue", "kueue.enabled=false"),
        (
            ['controller={"enabled":true,"gateway":{"name":"public"}}'],
            "gateway.networking.k8s.io/v1/HTTPRoute",
            "controller.enabled=false",
        ),
        (["monitoring.rules=true"], "monitoring.coreos.com/v1/PrometheusRule", "monitoring.rules=false"),
        (
            ["monitoring.serviceMonitor=true"],
            "monitoring.coreos.com/v1/ServiceMonitor",
            "monitoring.serviceMonitor=false",
        ),
    ],
)
def test_a_part_that_the_cluster_cannot_hold_is_refused_by_name(sets: list[str], missing: str, remedy: str) -> None:
    """The API server would say `no matches for kind` half-way through, without what to install."""
    off = [] if "Training" in missing else ["trainer.enabled=false", 'pipelines.launch="pods"']
    ran = template(sets=[*off, *sets], apis=())
    assert ran.returncode != 0
    assert missing in ran.stderr and remedy in ran.stderr


def test_a_definition_that_nobody_brings_is_refused_by_name() -> None:
    """The controller would start, and be refused every look at the models, on a cluster without the definition."""
    sets = ['controller={"enabled":true,"definition":false,"gateway":{"name":"public"}}']
    ran = template(sets=sets)
    assert ran.returncode != 0 and "controller.definition=true" in ran.stderr
    documents = render(sets=sets, apis=[*APIS, "nvila.io/v1alpha1/ModelRollout"])
    assert "CustomResourceDefinition" not in {d["kind"] for d in documents}


def test_the_definition_stays_when_the_release_goes() -> None:
    """With the definition every ModelRollout would go, and with those the pods that serve."""
    crd = find(render(EVERYTHING), "CustomResourceDefinition", f"{PLURAL}.{GROUP}")
    assert crd["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert crd["spec"] == definition()["spec"]


def test_a_warm_up_of_a_volume_that_nobody_mounts_is_refused() -> None:
    """Every run would fetch the weights again, while the DaemonSet says that they are there."""
    sets = ['cache.type="claim"', 'namespaces=["team-a"]']
    ran = template(EVERYTHING, sets=sets)
    assert ran.returncode != 0 and "cache.type=hostPath" in ran.stderr
    assert template(EVERYTHING, sets=[sets[0], 'namespaces=["nvila"]']).returncode == 0


def test_jobs_without_a_runtime_are_refused() -> None:
    """Every training step would fail with a runtime that is not there."""
    ran = template(sets=["trainer.enabled=false"], apis=())
    assert ran.returncode != 0 and "pipelines.launch=pods" in ran.stderr


def test_without_trainer_and_kueue_nothing_of_theirs_is_left() -> None:
    """A cluster without them must be able to take the rest."""
    documents = render(sets=["trainer.enabled=false", 'pipelines.launch="pods"'], apis=())
    assert {d["apiVersion"].partition("/")[0] for d in documents} == {
        "apps", "batch", "networking.k8s.io", "rbac.authorization.k8s.io", "v1",
    }  # fmt: skip
    site = Site.read(find(documents, "ConfigMap", "nvila-site")["data"])
    assert site is not None and not site.launcher
    assert "trainjobs" not in str(documents)


@pytest.mark.parametrize(("launch", "gpus", "launches"), [("jobs", 4, True), ("pods", 4, False), ("cpu", 0, False)])
def test_one_pipeline_serves_every_site(launch: str, gpus: int, launches: bool) -> None:
    """What pods ask for comes from here: with GPUs on `cpu` they wait for ever, without a toleration on the others."""
    taint = [{"key": "a", "operator": "Exists"}]
    values = {"perNode": 4, "nodeLabels": {"pool": "h100"}, "tolerations": taint}
    documents = render(sets=[f'pipelines.launch="{launch}"', *(f"gpu.{k}={json.dumps(v)}" for k, v in values.items())])
    site = Site.read(find(documents, "ConfigMap", "nvila-site")["data"])
    assert site is not None and (site.gpus_per_node, bool(site.launcher)) == (gpus, launches)
    assert (site.gpu_labels, list(site.tolerations)) == ({"pool": "h100"}, taint)
    assert (site.node_cpu, site.node_memory) == ("96", "1200Gi")


def test_external_mlflow_leaves_no_server_behind() -> None:
    """Two stores of the same experiments would each have half of the runs."""
    documents = render(sets=['mlflow.mode="external"', 'mlflow.uri="https://mlflow.example"'])
    assert find(documents, "ConfigMap", "nvila-site")["data"]["MLFLOW_TRACKING_URI"] == "https://mlflow.example"
    assert {f"MLFLOW_TRACKING_{part}" for part in ("USERNAME", "PASSWORD", "TOKEN")} <= set(kept("secret")), "its login"
    assert [d for d in documents if "mlflow" in d["metadata"]["name"] or "postgres" in d["metadata"]["name"]] == []


def test_kfp_is_told_of_the_bucket_only_when_asked() -> None:
    """KFP has such a ConfigMap wherever runs take place by default: helm refuses to install over it."""
    name = "kfp-launcher"
    assert [d for d in render() if d["metadata"]["name"] == name] == []
    sets = ["pipelines.launcherConfig=true", 's3={"bucket":"b-1","endpoint":"http://s3.example:9000"}']
    data = find(render(sets=sets), "ConfigMap", name)["data"]
    assert data["defaultPipelineRoot"] == "s3://b-1/pipelines/nvila"
    store = yaml.safe_load(data["providers"])["s3"]["default"]
    assert (store["endpoint"], store["disableSSL"]) == ("http://s3.example:9000", True)
    secret = {"secretName": SECRET, "accessKeyKey": "AWS_ACCESS_KEY_ID", "secretKeyKey": "AWS_SECRET_ACCESS_KEY"}
    assert store["credentials"] == {"fromEnv": False, "secretRef": secret}


def test_mlflow_takes_requests_of_its_own_pages() -> None:
    """MLflow holds a browser's POST from an origin that it does not know for an attack: the pages stay empty."""
    from mlflow.server.security_utils import should_block_cors_request

    def origins(*sets: str) -> list[str]:
        pod = find(render(sets=sets), "Deployment", "nvila-mlflow")["spec"]["template"]["spec"]
        return [
            origin
            for argument in pod["containers"][0]["args"]
            if argument.startswith("--cors-allowed-origins=")
            for origin in argument.partition("=")[2].split(",")
        ]

    assert origins() == []
    allowed = origins('mlflow.allowedHosts=["mlflow.example"]')
    assert should_block_cors_request("https://mlflow.example", "POST", []) is True
    assert should_block_cors_request("https://mlflow.example", "POST", allowed) is False
    assert should_block_cors_request("https://other.example", "POST", allowed) is True


def test_the_older_kueue_api_is_used_where_only_that_is() -> None:
    """Kueue before 0.15 has no v1beta2, and its field of the cohort has another name."""
    apis = ["trainer.kubeflow.org/v1alpha1/ClusterTrainingRuntime", "kueue.x-k8s.io/v1beta1/ClusterQueue"]
    documents = render(sets=["kueue.enabled=true", 'kueue.cohort="research"'], apis=apis)
    queue = find(documents, "ClusterQueue", "nvila")
    assert (queue["apiVersion"], queue["spec"]["cohort"]) == ("kueue.x-k8s.io/v1beta1", "research")
