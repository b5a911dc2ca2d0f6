"""`nvila submit` against a server that holds every request and answer against the models of KFP's client."""

import functools
import io
import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kfp_stand_in import STARTED, TOKEN, StandIn, standing_in
from rich.console import Console
from typer.testing import CliRunner

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, NvilaError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.pipelines import PIPELINES
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.steps import ROWS
from nvila.components.runner.code import code_digest
from nvila.pipelines.cli import app
from nvila.pipelines.compile import package as cluster
from nvila.pipelines.compile.package import resource_name
from nvila.pipelines.kubeflow import run as running
from nvila.pipelines.kubeflow import submit as submitting
from nvila.pipelines.kubeflow import tasks
from nvila.pipelines.kubeflow.connection import Connection, ServerDown
from nvila.pipelines.kubeflow.server import Server
from nvila.pipelines.kubeflow.submit import Version, Wanted, namespace_of, upload
from nvila.pipelines.show import standing
from nvila.pipelines.show.watch import Watch

NAME = resource_name("lifecycle")
SHARED = Wanted()
COMPILED = functools.cache(cluster.compiled)
"""It takes seconds."""
OWN = Version("registry.example/base:1", "registry.example/quantize:1")
LATER = "2026-11-22T10:05:00Z"


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name in ("KF_PIPELINES_TOKEN", "KF_PIPELINES_SA_TOKEN_PATH", "KF_PIPELINES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(running, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(standing, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(cluster, "compiled", COMPILED)
    with standing_in() as stand_in:
        yield stand_in


def _submit(
    kfp: StandIn, version: Version = OWN, wanted: Wanted = SHARED, recipe: str = "micro", **options: Any
) -> tuple[int, str]:
    """Exit code and what the terminal showed."""
    out = io.StringIO()
    console = Console(file=out, width=200)
    overrides = options.pop("overrides", [])
    code = submitting.submit(
        recipe, overrides, Server(Connection(kfp.url, Environment.read())), version, wanted, console, **options
    )
    return code, out.getvalue()


def _task(step: str, state: str, message: str = "", created: str = STARTED, **fields: Any) -> dict[str, Any]:
    error = {"error": {"code": 13, "message": message}} if message else {}
    task = {"run_id": "r0", "task_id": f"{step}-{created}", "display_name": step, "state": state}
    return task | {"create_time": created, "start_time": created, "end_time": LATER} | error | fields


def _run(state: str, *tasks: dict[str, Any]) -> dict[str, Any]:
    return {"state": state, "run_details": {"task_details": list(tasks)}}


def test_a_run_gets_the_form_and_the_pipeline_of_this_checkout(kfp: StandIn) -> None:
    """A field that is lost, or an older pipeline, gives a run of something else than was asked for."""
    code, output = _submit(
        kfp,
        wanted=Wanted(experiment="mine", run_name="first", service_account="pipeline-runner"),
        overrides=["evaluate.limit=17"],
        data_uri="data/plates",
        model_name="plates",
    )
    (run,), (version,) = kfp.runs, kfp.versions
    assert code == 0 and f"{kfp.url}/#/runs/details/r0" in output
    assert (run["display_name"], run["service_account"]) == ("first", "pipeline-runner")
    assert kfp.experiments[0]["display_name"] == "mine"
    assert run["runtime_config"]["parameters"] == {
        "recipe": "micro",
        "data_uri": "data/plates",
        "model_name": "plates",
        "keep_ratio": 0.0,
        "target": "",
        "overrides": {"evaluate": {"limit": 17}},
    }
    executors = kfp.specs[version["name"]]["deploymentSpec"]["executors"]
    assert executors["exec-quantize"]["container"]["image"] == "registry.example/quantize:1"
    assert {"name": "NVILA_CODE", "value": code_digest()} in executors["exec-initialize"]["container"]["env"]


@pytest.mark.parametrize(
    ("recipe", "target", "taken"), [("micro", "kubernetes", "kubernetes"), ("tiny", "", "none"), ("micro", "", "")]
)
def test_a_run_is_served_where_a_pod_can_have_it_served(kfp: StandIn, recipe: str, target: str, taken: str) -> None:
    """A recipe of one machine runs on a cluster too; what somebody has asked for is not replaced in silence."""
    _submit(kfp, recipe=recipe, target=target)
    assert kfp.runs[0]["runtime_config"]["parameters"]["target"] == taken
    for options in ({"target": "local"}, {"overrides": ["rollout.target=local"]}):
        with pytest.raises(ConfigError, match=r"rollout\.target: no pod can serve so .*none, kubernetes"):
            _submit(kfp, **options)


def test_a_recipe_with_more_stages_than_the_pipeline_starts_nothing(kfp: StandIn) -> None:
    """The run would end in its first pod, after a wait for it."""
    stages = fill_in(Form(recipe="micro")).model_dump(mode="json")["train"]["stages"]
    more = f"train.stages={json.dumps([*stages, stages[-1]])}"
    with pytest.raises(ConfigError, match="6 stages, and this pipeline has training steps for 5"):
        _submit(kfp, overrides=[more])
    assert not kfp.runs and not kfp.versions


def test_the_same_pipeline_is_uploaded_once(kfp: StandIn) -> None:
    """Each submission would otherwise leave a version behind, and the list in the UI would be of no use."""
    _submit(kfp)
    code, output = _submit(kfp)
    assert code == 0 and "is there already" in output
    assert (len(kfp.versions), len(kfp.runs)) == (1, 2)
    _submit(kfp, Version("registry.example/base:2", "registry.example/quantize:1"))
    assert len({version["name"] for version in kfp.versions}) == 2


def test_an_upload_alone_starts_nothing(kfp: StandIn) -> None:
    """What a Job of the chart calls on every upgrade."""
    for _ in range(2):
        upload(Server(Connection(kfp.url, Environment.read())), OWN, None, Console(file=io.StringIO()))
    assert (len(kfp.pipelines), len(kfp.versions), kfp.runs) == (1, 1, [])
    with pytest.raises(ConfigError, match=r"--image"):
        upload(Server(Connection(kfp.url, Environment.read())), Version(), None, Console(file=io.StringIO()))


@pytest.mark.parametrize("namespace", [None, "ada"])
def test_a_pipeline_may_be_everybodys(kfp: StandIn, namespace: str | None) -> None:
    """The platform's engineers install one for all users; a run always belongs to one."""
    kfp.multi_user = True
    arguments = ["--host", kfp.url, "--upload-only", "--image", OWN.image, "--quantize-image", OWN.quantize_image]
    arguments += ["--namespace", namespace] if namespace else []
    ended = CliRunner().invoke(app, ["submit", *arguments])
    assert ended.exit_code == 0, ended.output
    assert [pipeline.get("namespace") for pipeline in kfp.pipelines] == [namespace] * 2 and len(kfp.versions) == 2


def test_the_newest_installed_version_is_taken(kfp: StandIn) -> None:
    """Who names no image wants what the platform's engineers have installed, and not its first release."""
    kfp.install(NAME, versions=5)
    assert _submit(kfp, Version())[0] == 0
    assert kfp.runs[0]["pipeline_version_reference"]["pipeline_version_id"] == "v4"
    assert len(kfp.versions) == 5


def test_nothing_installed_is_told(kfp: StandIn) -> None:
    """A run of a pipeline that is not there would fail with the server's words."""
    with pytest.raises(ConfigError, match=f"no pipeline {NAME} is installed.*--image"):
        _submit(kfp, Version())
    assert kfp.runs == []


def test_users_have_namespaces(kfp: StandIn) -> None:
    """In a namespace the own pipeline comes first, then the shared one; runs and experiments are the user's."""
    kfp.multi_user = True
    kfp.install(NAME)
    with pytest.raises(ConfigError, match=r"--namespace.*Name yours"):
        _submit(kfp, Version())
    _submit(kfp, Version(), Wanted(namespace="ada"))
    assert kfp.runs[0]["pipeline_version_reference"]["pipeline_id"] == "p0"
    assert kfp.experiments[0]["namespace"] == "ada"
    kfp.install(NAME, namespace="ada")
    _submit(kfp, Version(), Wanted(namespace="ada"))
    assert kfp.runs[1]["pipeline_version_reference"]["pipeline_id"] == "p1"
    with pytest.raises(ConfigError, match=r"not allowed: .*namespace bob.*--namespace"):
        _submit(kfp, Version(), Wanted(namespace="bob"))


def test_a_server_without_users_takes_no_namespace(kfp: StandIn) -> None:
    """It would refuse each call in words that do not name the option."""
    with pytest.raises(ConfigError, match=r"--namespace.*no namespaces"):
        namespace_of(Server(Connection(kfp.url, Environment.read())), "ada")


def test_the_token_is_asked_for_sent_and_never_shown(
    kfp: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token in a log is a token in everybody's hands; the server's own error may repeat it."""
    kfp.needs_token = True
    with pytest.raises(ConfigError, match=r"asks for a token.*--token-file"):
        Server(Connection(kfp.url, Environment.read())).multi_user()
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "old")
    with pytest.raises(ConfigError, match=r"does not accept the token"):
        Server(Connection(kfp.url, Environment.read())).multi_user()
    file = tmp_path / "token"
    file.write_text("old\n")
    server = Server(Connection(kfp.url, Environment.read(), token_file=file))
    file.write_text(TOKEN + "\n")
    assert server.multi_user() is False, "tokens are renewed in their file"
    kfp.failing = [("GET", "healthz", 418)]
    with pytest.raises(ConfigError, match=r"injected Bearer \*\*\*") as caught:
        server.multi_user()
    assert TOKEN not in str(caught.value)
    with pytest.raises(ConfigError, match=r"--token-file"):
        Server(Connection(kfp.url, Environment.read(), token_file=tmp_path / "none"))


@pytest.mark.parametrize("status", [302, 200])
def test_a_page_to_log_in_is_no_answer(status: int) -> None:
    """Kubeflow sends whoever has no valid token there; a run that was never started was reported as started."""

    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path.startswith("/dex") else status)
            self.send_header("Location", "/dex/auth")
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>Log in</html>")

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        server = Server(Connection(f"http://127.0.0.1:{gateway.server_port}", Environment.read()))
        for ask in (server.multi_user, lambda: server.run("r"), lambda: server.terminate("r")):
            with pytest.raises(ConfigError, match=r"not the API.*--token-file"):
                ask()
        gateway.shutdown()


def test_a_fault_of_the_server_is_waited_out_where_nothing_is_made(kfp: StandIn) -> None:
    """A restart of the server must not fail a submission; a run that is created twice would train twice."""
    kfp.install(NAME)
    kfp.failing = [("GET", "healthz", 500), ("GET", "experiments", 503), ("GET", "experiments", 502)]
    assert _submit(kfp, Version())[0] == 0
    kfp.failing = [("POST", "runs", 500)]
    with pytest.raises(ServerDown, match=r"answers 500"):
        _submit(kfp, Version())
    assert kfp.asked.count("POST /runs") == 2 and len(kfp.runs) == 1


@pytest.mark.parametrize("body", [b"", b"{}", b'{"run_id": "r0", "sta', b"null", b'{"run_id": "\xff"}'])
def test_an_answer_that_breaks_off_starts_no_run(kfp: StandIn, body: bytes) -> None:
    """`run None` was reported as started, with exit code 0."""
    kfp.install(NAME)
    kfp.broken["POST /runs"] = body
    with pytest.raises(NvilaError, match=r"cannot be read|names no run|nothing|a page"):
        _submit(kfp, Version())


def test_more_than_a_page_is_read(kfp: StandIn) -> None:
    """The experiment on the second page would be made again, which the server refuses."""
    kfp.install(NAME)
    kfp.experiments = [{"experiment_id": f"e{n}", "display_name": name} for n, name in enumerate(["a", "b", "nvila"])]
    assert _submit(kfp, Version())[0] == 0
    assert kfp.runs[0]["experiment_id"] == "e2" and len(kfp.experiments) == 3


@pytest.mark.parametrize("hidden", [1, 2, 3])
def test_two_submissions_at_once_share_what_they_make(kfp: StandIn, hidden: int) -> None:
    """Pipeline, version or experiment appear between looking and making: a conflict is no failure then."""
    _submit(kfp)
    kfp.listings, kfp.hidden = 0, {hidden}
    assert _submit(kfp)[0] == 0
    assert (len(kfp.pipelines), len(kfp.versions), len(kfp.experiments), len(kfp.runs)) == (1, 1, 1, 2)


def test_a_name_that_is_taken_out_of_sight_is_one_line(kfp: StandIn) -> None:
    """The pipeline of somebody else cannot be read, and cannot be made."""
    _submit(kfp)
    kfp.hidden = range(10**6)
    with pytest.raises(ConfigError, match=f"a pipeline {NAME} is there, but not yours") as caught:
        _submit(kfp)
    assert "\n" not in str(caught.value)


def test_a_wrong_recipe_reaches_no_server(kfp: StandIn) -> None:
    """What can be said here is not found out on the cluster."""
    with pytest.raises(ConfigError, match=r"Did you mean evaluate.limit"):
        _submit(kfp, overrides=["evaluate.limt=7"])
    assert kfp.asked == []


@pytest.mark.parametrize(
    ("end", "code", "word"),
    [
        (_run("SUCCEEDED", _task("initialize", "SUCCEEDED")), Exit.DONE, "succeeded"),
        (_run("CANCELED", _task("initialize", "CANCELED")), Exit.PREEMPTED, "the run was cancelled"),
        (_run("FAILED", _task("train-1", "FAILED", "OOMKilled (exit code 137)")), Exit.FAULT, "train-1: OOMKilled"),
        (_run("FAILED"), Exit.FAULT, "failed"),
        (_run("FAILED", _task("gate", "FAILED")), Exit.FAULT, "gate: Kubeflow gives no reason; the step report tells"),
    ],
)
def test_the_runs_result_is_the_exit_code(kfp: StandIn, end: dict[str, Any], code: Exit, word: str) -> None:
    """A script that retries a refusal, or takes it for a success, does harm."""
    kfp.install(NAME)
    kfp.script = [_run("PENDING"), _run("RUNNING", _task("resolve", "RUNNING", end_time=None)), end]
    assert _submit(kfp, Version(), wait=True)[0] == code
    kfp.script = [end]
    assert word in _submit(kfp, Version(), wait=True)[1]


def test_a_try_that_was_followed_by_another_is_no_verdict(kfp: StandIn) -> None:
    """A failed step is started again: what ends the run is its last try, and what failed first."""
    again = "2026-11-22T10:01:00Z"
    end = _run(
        "FAILED",
        _task("initialize", "FAILED", "first try"),
        _task("initialize", "SUCCEEDED", created=again),
        _task("train-1", "FAILED", "came first", created=again, end_time="2026-11-22T10:03:00Z"),
        _task("train-2", "FAILED", "came later", created=again),
        _task("train-1-driver", "FAILED", "of no step"),
    )
    kfp.install(NAME)
    kfp.script = [end]
    assert "train-1: came first" in _submit(kfp, Version(), wait=True)[1]


def test_the_steps_are_shown_as_they_change(kfp: StandIn) -> None:
    """Who waits wants to know for what."""
    kfp.install(NAME)
    running = [_task("resolve", "SUCCEEDED"), _task("preflight", "RUNNING", end_time=None)]
    lost = _task("gate", "FAILED", "", state_history=[{"state": "FAILED", "error": {"message": "pod deleted"}}])
    kfp.script = [_run("RUNNING", *running), _run("FAILED", *running, lost)]
    output = _submit(kfp, Version(), wait=True)[1]
    assert all(line in output for line in ("resolve: done in 300.0 s", "preflight: running", "gate: failed", "pod del"))


def test_waiting_outlives_the_server(kfp: StandIn) -> None:
    """The run goes on when the API server is restarted; whoever waits for it must as well."""
    kfp.install(NAME)
    kfp.failing = [("GET", "runs/", 503)] * 5

    code, output = _submit(kfp, Version(), wait=True)
    assert code == 0 and output.count("trying again") == 1


@pytest.mark.parametrize("status", [401, 403, 302, 429])
def test_waiting_outlives_a_token(kfp: StandIn, status: int) -> None:
    """Tokens live an hour, runs for days: the wait ended with the exit code of a wrong recipe."""
    kfp.install(NAME)
    kfp.failing = [("GET", "runs/", status)] * 6
    code, output = _submit(kfp, Version(), wait=True)
    assert code == 0 and "the run goes on, trying again" in output


def test_waiting_for_a_run_that_is_gone_ends(kfp: StandIn) -> None:
    """It was deleted in the UI."""
    kfp.install(NAME)
    kfp.failing = [("GET", "runs/", 404)]
    with pytest.raises(ConfigError, match=r"no such run.*deleted"):
        _submit(kfp, Version(), wait=True)


@pytest.mark.parametrize("none", ["0001-01-01T00:00:00Z", "1970-01-01T00:00:00Z"])
def test_times_that_are_not_yet_known(none: str) -> None:
    """Kubeflow gives the end of a running step as the year 1 or 1970: every step was shown as 0 seconds old."""
    from kfp_server_api import ApiClient

    def state(step: str, **times: str) -> float:
        answer = SimpleNamespace(data=json.dumps(_task(step, "RUNNING", **times)))
        task = ApiClient().deserialize(answer, "V2beta1PipelineTaskDetail")
        return tasks._state(step, task, datetime(2026, 11, 22, 10, 2, tzinfo=UTC)).seconds

    assert state("resolve", end_time=none) == 120
    assert state("resolve", start_time=none, end_time=none) == 0


def test_names_are_no_markup(kfp: StandIn) -> None:
    """`[v2]` vanished from a name, and `[/x]` was a traceback after the run had been started."""
    kfp.install(NAME)
    code, output = _submit(kfp, Version(), Wanted(run_name="try [v2] [/x]"), wait=True)
    assert code == 0 and "run try [v2] [/x]:" in output
    shown = Console(file=io.StringIO(), force_terminal=True)
    with Watch("[/x]", list, shown) as watch:
        watch.refresh()


def test_every_step_has_a_row() -> None:
    """The table is the DAG, also before the server knows of it."""
    from kfp_server_api import V2beta1Run

    assert [state.name for state in tasks.states(V2beta1Run(), PIPELINES["lifecycle"])] == list(ROWS)


@pytest.mark.parametrize(
    ("typed", "cancelled", "says"), [("continue\nc\n", True, "cancelled"), ("l\n", False, "goes on")]
)
def test_ctrl_c_asks_what_to_do_with_the_run(kfp: StandIn, typed: str, cancelled: bool, says: str) -> None:
    """Training that goes on unwanted costs a node; training that is cancelled unasked costs days."""
    kfp.install(NAME)
    kfp.script = [_run("RUNNING", _task("resolve", "RUNNING", end_time=None))]
    ours, theirs = pty.openpty()
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"  # ignored behind nohup
        "from nvila.pipelines import cli; from nvila.pipelines.kubeflow import run; run.POLL_SECONDS = 0.1;"
        f"sys.argv = ['nvila', 'submit', 'micro', '--host', {kfp.url!r}, '--wait']; cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    deadline = time.monotonic() + 60
    while "GET /runs/r0" not in kfp.asked and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(2)
    shown = _read_until(ours, "(w)?")
    os.write(ours, typed.encode())
    shown += _read_until(ours, says)
    assert shown.count("(w)?") == typed.count("\n")
    assert process.wait(timeout=30) == Exit.PREEMPTED
    assert (kfp.terminated == ["r0"]) is cancelled and "Traceback" not in shown
    os.close(ours)


def _read_until(terminal: int, word: str) -> str:
    shown = ""
    while word not in shown:
        assert select.select([terminal], [], [], 60)[0], f"{word!r} was not shown, but {shown[-2000:]!r}"
        try:
            shown += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the other end is closed
            raise AssertionError(f"{word!r} was not shown, but {shown[-2000:]!r}") from None
    return shown


def test_without_a_terminal_the_run_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a script there is nobody to ask, and cancelling cannot be taken back."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("c\n"))
    assert running._asked() == "l"


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("micro",), 2, "--host: not a URL"),
        (("micro", "--host", "kubeflow.example"), 2, "https://"),
        (("--host", "http://127.0.0.1:9"), 2, "which recipe"),
        (("micro", "--host", "http://127.0.0.1:9"), 2, "no answer"),
        (("micro", "--host", "http://127.0.0.1:9", "--ca-cert", "none.pem"), 2, "--ca-cert"),
    ],
)
def test_a_wrong_command_line_is_one_line(nvila: Any, arguments: tuple[str, ...], code: int, word: str) -> None:
    """A traceback of an HTTP library tells a data scientist nothing."""
    ended = nvila("submit", *arguments)
    assert ended.returncode == code, ended.stderr
    assert word in ended.stderr and ended.stderr.count("\n") == 1
