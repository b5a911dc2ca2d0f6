"""The compiled pipelines. `make golden` writes their files in tests/golden and the chart's copies anew."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila.components.contracts.environment import kept
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.keys import import_closure
from nvila.components.contracts.pipelines import PIPELINES, PipelineName
from nvila.components.contracts.placement import ON_GPUS, parameters
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.reader import shipped
from nvila.components.contracts.recipe.rollout import TARGETS
from nvila.components.contracts.site import Site
from nvila.components.contracts.steps import ROWS
from nvila.components.resolve.component import resolve
from nvila.components.runner.code import code_digest
from nvila.components.runner.image import IMAGE, QUANTIZE_IMAGE
from nvila.pipelines.compile import names as site
from nvila.pipelines.compile.package import SIZE_LIMIT_BYTES, compile_pipeline, compiled
from nvila.pipelines.compile.references import dangling_references

GOLDEN = Path(__file__).parents[1] / "golden"
CHART_FILES = Path(__file__).parents[2] / "charts" / "nvila-platform" / "files" / "pipelines"


@pytest.fixture(scope="module")
def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    return compiled("registry.example/nvila@sha256:0", "registry.example/nvila-quantize@sha256:1")


@pytest.fixture(scope="module")
def spec(documents: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return documents[0]


@pytest.fixture(scope="module")
def tuning() -> dict[str, Any]:
    """The pipeline that fine-tunes."""
    return compiled("registry.example/nvila@sha256:0", "registry.example/nvila-quantize@sha256:1", "finetune")[0]


@pytest.fixture(scope="module")
def pods(documents: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """By step: what Kubernetes adds to its pod."""
    executors = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): settings for name, settings in executors.items()}


def _tasks(spec: dict[str, Any]) -> dict[str, Any]:
    dags = [spec["root"], *spec["components"].values()]
    return {name: task for dag in dags for name, task in dag.get("dag", {}).get("tasks", {}).items()}


def _structure(spec: dict[str, Any]) -> dict[str, Any]:
    """What a reader of the graph sees: order, data flow, types and the form; not the wrappers' text."""
    tasks = {}
    for name, task in sorted(_tasks(spec).items()):
        component = spec["components"][task["componentRef"]["name"]]
        inputs = task.get("inputs", {})
        tasks[name] = {
            "after": sorted(task.get("dependentTasks", [])),
            "artifacts": {
                key: source["taskOutputArtifact"]["producerTask"] for key, source in inputs.get("artifacts", {}).items()
            },
            "outputs": {
                key: value["artifactType"]["schemaTitle"]
                for key, value in component.get("outputDefinitions", {}).get("artifacts", {}).items()
            },
        }
    form = spec["root"]["inputDefinitions"]["parameters"]
    return {
        "form": {name: [field["parameterType"], field.get("defaultValue")] for name, field in sorted(form.items())},
        "tasks": tasks,
    }


@pytest.mark.parametrize("name", PIPELINES)
def test_structure_is_the_golden_one(spec: dict[str, Any], tuning: dict[str, Any], name: str) -> None:
    """An edge lost in a refactoring changes what runs when; the diff of the golden file shows it."""
    structure, path = _structure({"lifecycle": spec, "finetune": tuning}[name]), GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(json.dumps(structure, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert structure == json.loads(path.read_text(encoding="utf-8")), "`make golden`, then look at the diff"


def test_fine_tuning_is_the_same_without_pruning(spec: dict[str, Any], tuning: dict[str, Any]) -> None:
    """A table of its own would drift: a step left out hands its input on, and everything else is the lifecycle's."""
    whole, tuned = _structure(spec)["tasks"], _structure(tuning)["tasks"]
    assert whole.keys() - tuned.keys() == {"prune-image", "prune-video", "train-4", "train-5"}
    assert tuned["evaluate"]["artifacts"]["model"] == tuned["quantize"]["artifacts"]["model"] == "train-3"
    assert {name for name, task in tuned.items() if task != whole[name]} == {"evaluate", "quantize"}
    assert list(dangling_references(tuning)) == []


def test_tasks_are_called_like_the_steps(spec: dict[str, Any]) -> None:
    """Slices, status files and the UI find a step by its name."""
    tasks = {name: task for name, task in _tasks(spec).items() if name != "exit-handler-1"}
    assert set(tasks) == set(ROWS)
    assert {n: t["inputs"]["parameters"]["step"]["runtimeValue"]["constant"] for n, t in tasks.items()} == {
        name: name for name in ROWS
    }


def test_kfps_own_cache_is_off(spec: dict[str, Any]) -> None:
    """Its key does not see our code: it would skip a step whose code has changed."""
    on = [name for name, task in _tasks(spec).items() if task.get("cachingOptions", {}).get("enableCache")]
    assert on == []


def test_the_report_is_written_for_failed_runs_too(spec: dict[str, Any]) -> None:
    """Without the exit handler's policy a rejected model would have no report."""
    assert _tasks(spec)["report"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_form_fields_are_explained(spec: dict[str, Any], tuning: dict[str, Any]) -> None:
    """The form in the UI shows these texts and nothing else; a choice that they leave out is not found."""
    said = ""
    for form in (spec, tuning):
        fields = form["root"]["inputDefinitions"]["parameters"]
        assert len(fields) <= 8
        assert [name for name, field in fields.items() if len(field.get("description", "")) < 20] == []
        assert all(target in fields["target"]["description"] for target in TARGETS)
        said += fields["recipe"]["description"]
    assert [name for name in shipped() if name not in said] == []
    assert "start_from" in fields and "start_from" not in spec["root"]["inputDefinitions"]["parameters"]


def test_a_run_from_the_form_serves_nothing_unless_asked(spec: dict[str, Any]) -> None:
    """`tiny` serves on the machine it runs on; in a pod that server would end with the pod."""
    assert spec["root"]["inputDefinitions"]["parameters"]["target"]["defaultValue"] == "none"


def test_every_executor_has_its_image_and_knows_where_things_lie(spec: dict[str, Any]) -> None:
    """A step that looks for its store in the container's own folder would find and keep nothing."""
    for name, executor in spec["deploymentSpec"]["executors"].items():
        container = executor["container"]
        quantizing = ROWS[name.removeprefix("exec-")].image == "quantize"
        wanted = "nvila-quantize@sha256:1" if quantizing else "nvila@sha256:0"
        assert container["image"] == f"registry.example/{wanted}", name
        assert {entry["name"]: entry["value"] for entry in container["env"]} == {
            "NVILA_STORE": "/nvila/store",
            "NVILA_RUN": "/nvila/runs/$NVILA_RUN_ID",
            "NVILA_ROOT": "/nvila",
            "NVILA_PIPELINE": "lifecycle",
            "NVILA_CODE": code_digest(),
        }, name


def test_every_pod_gets_the_volumes_and_the_sites_environment(pods: dict[str, Any]) -> None:
    """A step without the claims loses its work; one without the credentials cannot fetch weights."""
    assert set(pods) == set(ROWS)
    for name, pod in pods.items():
        assert {m["constant"]: m["mountPath"] for m in pod["pvcMount"]} == {"nvila": "/nvila", "nvila-cache": "/cache"}
        ((config,), (secret,)) = pod["configMapAsEnv"], pod["secretAsEnv"]
        assert (config["configMapName"], secret["secretName"]) == ("nvila-site", "nvila-credentials"), name
        assert {k["configMapKey"]: k["envVar"] for k in config["keyToEnv"]} == {key: key for key in site.CONFIG_KEYS}
        assert [k["secretKey"] for k in secret["keyToEnv"]] == [k["envVar"] for k in secret["keyToEnv"]], name
        assert config["optional"] and secret["optional"], "a namespace without them could start no pod"


def test_a_pod_has_the_keys_that_its_step_reads(pods: dict[str, Any]) -> None:
    """Whoever gets into one pod, by a damaged picture or a library, had all nine: the bucket's, the hub's, the webhook.

    Which code a step reaches says what it reads: libraries take their keys from the variables by themselves.
    """
    readers = {
        "components.data.remote.s3client": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
        "components.data.remote.hub": {"HF_TOKEN"},
        "components.report.webhook": {"NVILA_WEBHOOK_URL", "NVILA_WEBHOOK_SECRET"},
        "components.tracking.connect": {f"MLFLOW_TRACKING_{key}" for key in ("USERNAME", "PASSWORD", "TOKEN")},
        "components.rollout.step": {"NVILA_API_KEY"},
    }
    assert set().union(*readers.values()) == set(kept("secret")), "a key that nobody reads, or a reader that is new"
    for name, row in ROWS.items():
        reached = import_closure(f"nvila.components.{row.folder}.component")
        wanted = set().union(*(keys for module, keys in readers.items() if f"nvila.{module}" in reached))
        assert {entry["secretKey"] for entry in pods[name]["secretAsEnv"][0]["keyToEnv"]} == wanted, name


def test_failed_steps_are_started_again(spec: dict[str, Any]) -> None:
    """A node that is drained in the third night must not end the run, nor the pod that took its place."""
    policies = [task["retryPolicy"] for task in _tasks(spec).values() if "retryPolicy" in task]
    assert {int(policy["backoffMaxDuration"].removesuffix("s")) // 86400 for policy in policies} == {90}
    once = {name for name, task in _tasks(spec).items() if task.get("retryPolicy", {}).get("maxRetryCount") != 2}
    assert once == {"report", "exit-handler-1"}


def test_only_quick_steps_have_a_deadline(pods: dict[str, Any]) -> None:
    """A training step waits for its queue, maybe for days; and no autoscaler should move it meanwhile."""
    quick = {"resolve", "preflight", "gate", "gate-quantized", "report"}
    assert {name for name, pod in pods.items() if "activeDeadlineSeconds" in pod} == quick
    staying = {name for name, pod in pods.items() if len(pod.get("podMetadata", {}).get("annotations", {})) == 2}
    assert staying == set(ROWS) - quick


def test_what_pods_ask_for_comes_out_of_resolve(spec: dict[str, Any], pods: dict[str, Any]) -> None:
    """One compiled pipeline serves a recipe on a laptop's cluster and on 128 GPUs: a number in it is wrong for one."""
    executors = spec["deploymentSpec"]["executors"]
    made = spec["components"]["comp-resolve"]["outputDefinitions"]["parameters"]
    for name, row in ROWS.items():
        resources, pod = executors[f"exec-{name}"]["container"]["resources"], pods[name]
        for field in ("resourceCpuLimit", "resourceCpuRequest", "resourceMemoryLimit", "resourceMemoryRequest"):
            assert ("pipelinechannel--resolve-" in resources[field]) is (row.size != "small"), name
        if name != "resolve" and not row.at_exit:
            sources = [pod["nodeSelector"]["nodeSelectorJson"], pod["tolerations"][0]["tolerationJson"]]
            assert {source["taskOutputParameter"]["outputParameterKey"] for source in sources} <= set(made), name
        else:
            assert "tolerations" not in pod and "nodeSelector" not in pod, name
        if row.size in ON_GPUS:
            assert "resolve" in resources["accelerator"]["resourceCount"] + resources["accelerator"]["resourceType"]
            assert pod["emptyDirMounts"][0]["mountPath"] == "/dev/shm", "vLLM and NCCL end in a container's 64 MiB"
        else:
            assert "accelerator" not in resources, name


def test_resolve_gives_every_parameter_in_this_order() -> None:
    """Its wrapper lists them by hand, as KFP reads its source: a missing one leaves pods without a size."""
    found = parameters(fill_in(Form(recipe="micro")), Site())
    kinds = {str: "String", list: "List", dict: "Dict"}
    made = {name: output.type for name, output in resolve.component_spec.outputs.items() if name != "slices"}
    assert list(made.items()) == [(name, kinds[type(value)]) for name, value in found.items()]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_charts_copy_is_the_compiled_pipeline(tmp_path: Path, name: PipelineName) -> None:
    """An install would bring the pipeline of an older commit."""
    fresh, kept = tmp_path / "fresh.yaml", CHART_FILES / f"{name}.yaml"
    size = compile_pipeline(fresh, pipeline=name, format="manifests")
    if os.environ.get("UPDATE_GOLDEN"):
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(fresh.read_bytes())
    assert fresh.read_bytes() == kept.read_bytes(), "`make golden`, then look at the diff"
    assert size == kept.stat().st_size < SIZE_LIMIT_BYTES
    pipeline, version = yaml.safe_load_all(kept.read_text(encoding="utf-8"))
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"]
    images = {e["container"]["image"] for e in version["spec"]["pipelineSpec"]["deploymentSpec"]["executors"].values()}
    assert images == {IMAGE, QUANTIZE_IMAGE}


def test_another_pipeline_has_another_version_name(tmp_path: Path) -> None:
    """A version cannot be changed: an upgrade under the same name would be refused, or lost."""

    def version(image: str) -> str:
        compile_pipeline(tmp_path / "out.yaml", image, "b:1", format="manifests")
        return list(yaml.safe_load_all((tmp_path / "out.yaml").read_text()))[1]["metadata"]["name"]

    assert version("a:1") == version("a:1") != version("a:2")


def test_kfp_reads_the_file(tmp_path: Path) -> None:
    """The file is put together by us; what KFP's own loader refuses the UI refuses as well."""
    from kfp import components

    compile_pipeline(tmp_path / "out.yaml", "a:1", "b:1")
    assert components.load_component_from_file(str(tmp_path / "out.yaml")).name == "lifecycle"


def test_sound_pipeline_has_no_dangling_reference(spec: dict[str, Any]) -> None:
    """The check must not cry wolf."""
    assert list(dangling_references(spec)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dependentTasks", 0), "no-such-task"),
        (("inputs", "artifacts", "samples", "taskOutputArtifact", "producerTask"), "no-such-task"),
        (("inputs", "artifacts", "samples", "taskOutputArtifact", "outputArtifactKey"), "no-such-output"),
        (("inputs", "artifacts", "samples"), {"componentInputArtifact": "no-such-input"}),
        (("inputs", "parameters", "step"), {"componentInputParameter": "no-such-input"}),
        (("inputs", "artifacts", "surplus"), {"componentInputArtifact": "surplus"}),
        (("componentRef", "name"), "comp-none"),
    ],
)
def test_each_kind_of_dangling_reference_is_found(spec: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    """KFP's loader accepts these; the run would fail on the cluster, late."""
    broken = copy.deepcopy(spec)
    place: Any = broken["components"]["comp-exit-handler-1"]["dag"]["tasks"]["quantize"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert len(list(dangling_references(broken))) >= 1


def test_an_input_that_is_not_given_is_found(spec: dict[str, Any]) -> None:
    """A required input without a source fails only in the pod."""
    broken = copy.deepcopy(spec)
    del broken["components"]["comp-exit-handler-1"]["dag"]["tasks"]["quantize"]["inputs"]["artifacts"]["model"]
    assert list(dangling_references(broken)) == ["comp-exit-handler-1/quantize: artifacts: model is not given"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A folder given as the file was a traceback."""
    with pytest.raises(ConfigError, match="cannot be written"):
        compile_pipeline(tmp_path)


def test_a_bad_image_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    """Half a file would be taken for a pipeline."""
    with pytest.raises(ConfigError):
        compile_pipeline(tmp_path / "out.yaml", image="two words")
    with pytest.raises(ConfigError, match="--quantize-image"):
        compile_pipeline(tmp_path / "out.yaml", quantize_image="")
    with pytest.raises(ConfigError, match="both images"):
        compile_pipeline(tmp_path / "out.yaml", image="registry.example/nvila:1")
    assert list(tmp_path.iterdir()) == []
