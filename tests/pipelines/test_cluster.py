"""The compiled pipeline. `make golden` writes tests/golden/lifecycle.json anew."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila.components.contracts.errors import ConfigError
from nvila.pipelines.cluster import SIZE_LIMIT_BYTES, compile_pipeline, dangling_references
from nvila.pipelines.steps import STEPS

GOLDEN = Path(__file__).parents[1] / "golden" / "lifecycle.json"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "lifecycle.yaml"
    compile_pipeline(path, image="registry.example/nvila@sha256:0")
    return path


@pytest.fixture(scope="module")
def spec(compiled: Path) -> dict[str, Any]:
    return next(yaml.safe_load_all(compiled.read_text(encoding="utf-8")))


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


def test_structure_is_the_golden_one(spec: dict[str, Any]) -> None:
    """An edge lost in a refactoring changes what runs when; the diff of the golden file shows it."""
    structure = _structure(spec)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(structure, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    assert structure == json.loads(GOLDEN.read_text(encoding="utf-8")), "`make golden`, then look at the diff"


def test_tasks_are_called_like_the_steps(spec: dict[str, Any]) -> None:
    """Slices, status files and the UI find a step by its name."""
    tasks = {name: task for name, task in _tasks(spec).items() if name != "exit-handler-1"}
    assert set(tasks) == set(STEPS)
    assert {n: t["inputs"]["parameters"]["step"]["runtimeValue"]["constant"] for n, t in tasks.items()} == {
        name: name for name in STEPS
    }


def test_kfps_own_cache_is_off(spec: dict[str, Any]) -> None:
    """Its key does not see our code: it would skip a step whose code has changed."""
    on = [name for name, task in _tasks(spec).items() if task.get("cachingOptions", {}).get("enableCache")]
    assert on == []


def test_the_report_is_written_for_failed_runs_too(spec: dict[str, Any]) -> None:
    """Without the exit handler's policy a rejected model would have no report."""
    assert _tasks(spec)["report"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_form_fields_are_explained(spec: dict[str, Any]) -> None:
    """The form in the UI shows these texts and nothing else."""
    fields = spec["root"]["inputDefinitions"]["parameters"]
    assert len(fields) <= 8
    assert [name for name, field in fields.items() if len(field.get("description", "")) < 20] == []


def test_every_executor_has_the_image_and_knows_its_store(spec: dict[str, Any]) -> None:
    """A step that looks for its store in the container's own folder would find and keep nothing."""
    for name, executor in spec["deploymentSpec"]["executors"].items():
        container = executor["container"]
        assert container["image"] == "registry.example/nvila@sha256:0", name
        assert {entry["name"] for entry in container["env"]} >= {"NVILA_STORE", "NVILA_RUN"}, name


def test_training_asks_for_gpus(spec: dict[str, Any]) -> None:
    """A training pod without GPUs would start and crawl."""
    train = spec["deploymentSpec"]["executors"]["exec-train-4"]["container"]["resources"]
    assert int(train["accelerator"]["resourceCount"]) == 8
    assert "accelerator" not in spec["deploymentSpec"]["executors"]["exec-gate"]["container"]["resources"]


def test_compiled_file_is_small(compiled: Path) -> None:
    """Kubernetes refuses large objects, and only when the run is submitted."""
    assert compiled.stat().st_size < SIZE_LIMIT_BYTES


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


def test_a_bad_image_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    """Half a file would be taken for a pipeline."""
    with pytest.raises(ConfigError):
        compile_pipeline(tmp_path / "out.yaml", image="two words")
    assert list(tmp_path.iterdir()) == []
