"""The step `preflight` and its single checks."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from buckets import Bucket

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import PreflightError, Unreachable
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.processes import Process
from nvila.components.contracts.recipe.data import Source
from nvila.components.preflight import checks, step
from nvila.components.preflight.checks import weights_problems
from nvila.components.serve import deployment
from nvila.components.serve.deployment import Guards, Status, Version, VersionStatus, Wanted
from nvila.components.serve.ports import free_port
from nvila.components.tracking import connect

RECORD = [{"id": "1", "image": "a.png", "conversations": []}]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    folder = tmp_path / "data" / "digits"
    folder.mkdir(parents=True)
    for name in ("sft.json", "heldout.json"):
        (folder / name).write_text(json.dumps(RECORD))
    return Source(name="digits", kind="image", path=str(folder))


@pytest.fixture
def settings(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setenv("NVILA_RUN", str(tmp_path / "runs" / "r1"))
    monkeypatch.setenv("NVILA_STORE", str(tmp_path / "store"))
    return {
        "data": {"sources": [source.model_dump(mode="json")]},
        "rollout": {"target": "none"},
        "needs": {"memory_bytes": 1, "disk_bytes": 1},
        "vllm": False,
    }


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def _run(settings: dict, tmp_path: Path) -> None:
    step.run(step.Settings.model_validate(settings), {}, tmp_path, Environment.read())


def test_an_mlflow_that_is_away_is_found_before_anything_begins(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong port was found out by `register`, after hours; what may pass ends with 75, what cannot with 2."""
    monkeypatch.setattr(connect, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port('127.0.0.1')}")
    with pytest.raises(Unreachable, match=r"MLflow does not answer: Failed to establish a new connection: .*refused"):
        _run(settings, tmp_path)
    with pytest.raises(PreflightError, match=r"2 problems: .*MLflow does not answer"):
        _run(settings | {"needs": {"memory_bytes": 1, "disk_bytes": 2**60}}, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(PreflightError, match="a folder cannot be the tracking store"):
        _run(settings, tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "mlflow.db").write_text("no database at all")
    with pytest.raises(PreflightError, match="file is not a database"):
        _run(settings, tmp_path)


def test_a_sound_machine_passes(settings: dict, tmp_path: Path) -> None:
    """Preflight must not cry wolf."""
    _run(settings, tmp_path)
    assert step.external(settings, Environment.read())["problems"] == []


def test_all_problems_come_in_one_message(settings: dict, tmp_path: Path, source: Source) -> None:
    """Mending one problem at a time costs a run each."""
    Path(source.path, "heldout.json").unlink()
    settings["drawn"] = {"digits": {"sft": ["stage 4", "stage 5"], "heldout": ["the evaluation"]}}
    settings["needs"] = {"memory_bytes": 10**15, "disk_bytes": 10**18}
    with pytest.raises(PreflightError) as caught:
        _run(settings, tmp_path)
    message = str(caught.value)
    assert all(
        word in message
        for word in (
            "heldout.json (or heldout.jsonl) is missing, from which the evaluation draws",
            "needs.memory_bytes",
            "needs.disk_bytes",
        )
    )
    assert caught.value.exit_code == Exit.USER and "\n" not in message


def test_one_disk_is_named_once(tmp_path: Path) -> None:
    """The runs and the store mostly share a folder; two equal lines look like two problems."""
    assert len(checks.disk_problems(10**18, [tmp_path / "store", tmp_path / "runs"])) == 1


@pytest.mark.parametrize(("content", "word"), [("[{", "broken JSON"), ("7", "JSON list"), ("[]", "one record")])
def test_annotation_files_must_be_lists_of_records(source: Source, content: str, word: str) -> None:
    """Found here in a second; found by validate after the environment was loaded."""
    Path(source.path, "sft.json").write_text(content)
    (problem,) = checks.data_problems([source])
    assert "sft.json" in problem and word in problem


def test_a_demo_source_may_still_be_missing_before_it_is_built(tmp_path: Path) -> None:
    """The first `nvila run tiny` on a fresh clone must not be refused for want of data it builds itself."""
    demo = Source(name="digits", kind="image", path=str(tmp_path / "none"), demo="digits")
    assert checks.data_problems([demo], demo_can_be_built=True) == []
    assert len(checks.data_problems([demo])) == 1
    own = Source(name="digits", kind="image", path=str(tmp_path / "none"))
    assert len(checks.data_problems([own], demo_can_be_built=True)) == 1


def test_versions_are_compared_with_the_lock(tmp_path: Path) -> None:
    """A package that was upgraded by hand gives results that nobody can repeat."""
    lock = tmp_path / "main.lock"
    lock.write_text(f"# comment\npsutil=={psutil.__version__}\ntyper==0.0.1\nno-such-package==1.0\n")
    (problem,) = checks.package_problems(lock)
    assert "typer is" in problem and "no-such-package==1.0 is missing" in problem and "psutil" not in problem


def test_the_installed_packages_are_those_of_the_lock() -> None:
    """The lock that is shipped is the environment that is tested."""
    assert checks.LOCK.is_file()
    assert checks.package_problems() == []


def test_a_port_used_by_someone_else_is_refused(settings: dict, listener: int, tmp_path: Path) -> None:
    """Otherwise the run would find out after twenty minutes, at rollout."""
    settings["rollout"] = {"target": "local", "port": listener}
    with pytest.raises(PreflightError) as caught:
        _run(settings, tmp_path)
    assert str(listener) in str(caught.value) and "already in use" in str(caught.value)


def _serve(runs: Path, model_dir: Path, port: int, born: float) -> None:
    """Records of an endpoint that this process looks after."""
    this = Process.this()
    version = Version(name="m", version="1", digest="d", model_dir=str(model_dir))
    server = VersionStatus(
        pid=this.pid,
        born=born,
        version=version,
        role="champion",
        state="ready",
        url="http://127.0.0.1:1",
        since=0,
        log="",
    )
    deployment.write(runs, Wanted(generation=1, host="127.0.0.1", port=port, champion=version))
    deployment.write(runs, Guards(guards=[(this.pid, born)]))
    deployment.write(runs, Status(generation=1, supervisor=this, url="u", admin="a", since=0, versions=[server]))


def test_a_port_held_by_our_own_endpoint_is_fine(listener: int, tmp_path: Path) -> None:
    """The second run finds the endpoint of the first: that is no reason to refuse, nor to repeat preflight."""
    assert step.port_problems("127.0.0.1", listener, tmp_path)
    _serve(tmp_path, tmp_path, listener, Process.this().born)
    assert step.port_problems("127.0.0.1", listener, tmp_path) == []
    _serve(tmp_path, tmp_path, listener, 1.0)
    assert step.port_problems("127.0.0.1", listener, tmp_path), "the pid was given to another program"


def test_memory_for_two_versions_is_asked_for_where_one_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an hour of training the system ended the new server, or the one that served."""
    monkeypatch.setattr(step, "available_bytes", lambda: 4 * 2**30)
    assert step.room_problems("side-by-side", tmp_path) == []
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2 * 2**30)
    _serve(tmp_path, tmp_path, 1, Process.this().born)
    (said,) = step.room_problems("side-by-side", tmp_path)
    assert "6.0 GiB" in said and "4.0 GiB are available" in said and "`replace`" in said
    assert step.room_problems("replace", tmp_path) == []


def test_a_missing_serving_environment_is_told_early(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that goes through vLLM cannot end well without it."""
    monkeypatch.setenv("NVILA_SERVE_PYTHON", str(tmp_path / "no-python"))
    _run(settings, tmp_path)
    with pytest.raises(PreflightError) as caught:
        _run(settings | {"vllm": True}, tmp_path)
    assert "NVILA_SERVE_PYTHON" in str(caught.value)


def test_the_key_changes_with_the_data_and_with_problems_only(settings: dict, source: Source) -> None:
    """Unchanged and healthy is a cache hit; new data or a new problem is looked at again."""
    first = step.external(settings, Environment.read())
    assert step.external(settings, Environment.read()) == first
    Path(source.path, "sft.json").write_text(json.dumps(RECORD * 2))
    assert step.external(settings, Environment.read()) != first
    settings["needs"]["memory_bytes"] = 10**15
    assert step.external(settings, Environment.read())["problems"] != []


def test_demonstration_data_are_built_before_the_key_is_taken(settings: dict, tmp_path: Path) -> None:
    """On a cluster nobody else builds them; built later, the second run would find another key and look again."""
    demo = Source(name="shapes", kind="image", path=str(tmp_path / "demo"), demo="shapes", demo_scale=0.01)
    settings["data"] = {"sources": [demo.model_dump(mode="json")]}
    step.prepare(step.Settings.model_validate(settings))
    first = step.external(settings, Environment.read())
    _run(settings, tmp_path)
    step.prepare(step.Settings.model_validate(settings))
    assert "shapes/sft.json" in first["annotations"] and step.external(settings, Environment.read()) == first


def test_a_pod_is_not_asked_for_what_other_pods_have(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: int
) -> None:
    """The pod of preflight is small and has no vLLM: judged by it, no large recipe would ever start on a cluster."""
    settings |= {"needs": {"memory_bytes": 10**15, "disk_bytes": 1}, "vllm": True}
    monkeypatch.setenv("NVILA_SERVE_PYTHON", str(tmp_path / "no-python"))
    monkeypatch.setenv("NVILA_RUN_ID", "2b4c")
    _run(settings, tmp_path)
    settings["needs"]["disk_bytes"] = 10**18
    settings["rollout"] = {"target": "local", "port": listener}
    with pytest.raises(PreflightError) as caught:
        _run(settings, tmp_path)
    message = str(caught.value)
    assert all(word in message for word in ("needs.disk_bytes", "rollout.target", "give none"))
    assert "memory" not in message and "in use" not in message


def test_an_fp8_that_this_machine_does_not_have_is_told_early(
    settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Delayed scales are Transformer Engine's: the first stage would say so, after the data and the base model. On a
    cluster another machine trains."""
    stage = {"name": "s", "trainable": ["llm"], "learning_rate": 1e-3, "data": {"digits.sft": 1}, "batch": 1}
    settings["train"] = {"precision": "fp8-delayed", "stages": [stage]}
    with pytest.raises(PreflightError, match=r"only Transformer Engine does fp8-delayed.* image `train`"):
        _run(settings, tmp_path)
    settings["train"]["precision"] = "fp8-current"
    _run(settings, tmp_path)
    settings["train"]["precision"] = "fp8-delayed"
    monkeypatch.setenv("NVILA_RUN_ID", "2b4c")
    _run(settings, tmp_path)


def test_weights_that_are_not_there_are_found_before_anything_long(s3: Bucket, tmp_path: Path) -> None:
    """Else validation runs for hours and `initialize` then says that the bucket has another name."""
    assert weights_problems(["s3://b/m", "s3://b/m", str(tmp_path)], tmp_path) == []
    assert s3.asked == ["LIST m/"]
    found = weights_problems(["s3://other/m", "s3://b/none", str(tmp_path / "nowhere")], tmp_path)
    assert [line.partition(": ")[0] for line in found] == ["s3://other/m", "s3://b/none", str(tmp_path / "nowhere")]
    s3.faults["LIST m/"] = [503, ...]
    with pytest.raises(Unreachable, match="s3://b/m: no success"):
        weights_problems(["s3://b/m"], tmp_path)
