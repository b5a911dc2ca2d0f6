"""The command line: help, wrong input, exit codes."""

import io
import json
import os
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from nvila.components.contracts.exits import Exit
from nvila.components.contracts.pipelines import PIPELINES
from nvila.components.contracts.recipe.reader import document, layers, shipped, shipped_document
from nvila.pipelines import cli
from nvila.pipelines.commands import ask, recipes
from nvila.pipelines.local import run as local_run

Nvila = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = ("run", "compile", "plan", "submit", "infer", "convert", "inspect", "serve", "status", "stop", "trace")


@pytest.mark.parametrize("command", [*COMMANDS, "recipe list", "recipe show", "recipe schema"])
def test_every_command_has_help_with_an_example(nvila: Nvila, command: str) -> None:
    """Help without an example sends people to the source."""
    shown = nvila(*command.split(), "--help")
    assert shown.returncode == 0
    assert f"Example: nvila {command}" in " ".join(shown.stdout.split())


def test_help_is_immediate(nvila: Nvila) -> None:
    """A heavy import slips in easily and makes every command slow; CPU seconds, as the machine may be busy."""
    seconds = []
    for _ in range(3):
        before = os.times()
        shown = nvila("--help").stdout
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert all(command in shown for command in COMMANDS)
    assert min(seconds) < 1.0


def test_an_error_steers_no_terminal_and_holds_no_password(nvila: Nvila) -> None:
    """It quotes what was given: a path with an escape in it, or with a password."""
    shown = nvila("inspect", "/no/such/password=hunter2/\x1b[2J\u202e")
    assert shown.returncode != 0
    assert shown.stderr.isascii() and "\x1b" not in shown.stderr and "hunter2" not in shown.stderr


@pytest.mark.parametrize("tty", [True, False])
def test_answers_are_made_safe_for_a_terminal_only(monkeypatch: pytest.MonkeyPatch, tty: bool) -> None:
    """A model repeats what it was shown; a program that reads the answer wants it as it is."""
    monkeypatch.setattr(ask, "infer", lambda *given: iter(["a\x1b[31", "m\n", "b\n"]))
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: tty)
    monkeypatch.setattr("sys.stdout", out)
    cli.app(["infer", "champion", "what?"], standalone_mode=False)
    assert out.getvalue() == ("a\\x1b[31m\nb\n" if tty else "a\x1b[31m\nb\n")


def _micro(tmp_path: Path, **sections: dict) -> str:
    content = yaml.safe_load(shipped_document("micro").text)
    for name, section in sections.items():
        content[name] = content.get(name, {}) | section
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def _refused(nvila: Nvila, tmp_path: Path, *args: str) -> str:
    """The one line on stderr of a run that is refused with exit code 2 and has written nothing."""
    before = sorted(tmp_path.rglob("*"))
    ended = nvila("run", *args)
    assert ended.returncode == Exit.USER, ended.stderr
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert sorted(tmp_path.rglob("*")) == before, "something was written"
    return ended.stderr


def test_an_unknown_key_names_its_path_and_the_nearest_right_one(nvila: Nvila, tmp_path: Path) -> None:
    """A key that is silently ignored trains another model than was asked for."""
    line = _refused(nvila, tmp_path, "micro", "--override", "train.chekpoint_seconds=5")
    assert "unknown recipe key train.chekpoint_seconds" in line and "train.checkpoint_seconds" in line


def test_a_recipe_file_is_named_in_the_message(nvila: Nvila, tmp_path: Path) -> None:
    """With several recipes about, one must see which is meant."""
    line = _refused(nvila, tmp_path, _micro(tmp_path, quantize={"metod": "rtn"}))
    assert "mine.yaml" in line and "quantize.metod" in line and "quantize.method" in line


def test_projector_and_vision_mode_that_cannot_work_together(nvila: Nvila, tmp_path: Path) -> None:
    """Found late, this is a shape error in the middle of stage 1."""
    line = _refused(nvila, tmp_path, "micro", "--override", "model.projector=mlp_downsample_3x3_fix")
    assert "mlp_downsample_3x3_fix" in line and "dynamic_s2" in line and "cannot work together" in line


def test_a_missing_data_file(nvila: Nvila, tmp_path: Path) -> None:
    """The file's own path must be in the message."""
    folder = tmp_path / "digits"
    folder.mkdir()
    (folder / "sft.json").write_text(json.dumps([{"id": "1"}]))
    sources = [
        {"name": name, "kind": kind, "path": str(folder)}
        for name, kind in (("shapes", "image"), ("digits", "image"), ("clips", "video"))
    ]
    line = _refused(nvila, tmp_path, _micro(tmp_path, data={"sources": sources}))
    assert str(folder / "heldout.json") in line and "missing" in line


def test_a_port_in_use_by_someone_else(nvila: Nvila, tmp_path: Path) -> None:
    """Found at rollout, this would cost the whole run."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        line = _refused(nvila, tmp_path, "micro", "-o", "rollout.target=local", "-o", f"rollout.port={port}")
    assert str(port) in line and "already in use" in line


@pytest.mark.parametrize(
    "args",
    [
        ("run", "no-such-recipe"),
        ("run", "no-such-file.yaml"),
        ("run", "micro", "--override", "seed"),
        ("infer", "no-such-model", "What is this?"),
        ("serve", "champion"),
        ("serve", "--port", "0"),
        ("serve", "--port", "70000"),
        ("serve", "--host", "nowhere.invalid"),
        ("serve", "--option", "max_bodies=3"),
        ("trace", "champion"),
        ("compile", "out.yaml", "--image", "two words"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(nvila: Nvila, args: tuple[str, ...]) -> None:
    """A traceback tells a user that we are broken, not that the input is."""
    ended = nvila(*args)
    assert ended.returncode == Exit.USER, ended.stderr
    assert len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith("nvila: ")


@pytest.mark.parametrize("scheme", ["s3", "hf", "file"])
@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("run", "micro", "--store"), "--store"),
        (("run", "micro", "--runs"), "--runs"),
        (("plan", "micro", "--store"), "--store"),
        (("infer", "champion", "What is this?", "--image"), "--image"),
        (("trace", "--store"), "--store"),
        (("stop", "--runs"), "--runs"),
        (("compile",), "OUT"),
        (("convert", ".", "--to", "hf"), "TARGET"),
    ],
)
def test_an_address_is_not_taken_for_a_path(
    args: tuple[str, ...], named: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--store s3://bucket` quietly made a folder `s3:` here, and the bucket stayed empty."""
    from typer.testing import CliRunner

    from nvila.components.contracts.errors import ConfigError
    from nvila.pipelines.cli import app

    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, [*args, f"{scheme}://bucket/place"])
    assert isinstance(ended.exception, ConfigError), ended.output
    message = f"{named}: not a path on this machine (got '{scheme}://bucket/place'). Give a local path"
    assert str(ended.exception).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_source_at_an_address_is_refused(nvila: Nvila, tmp_path: Path) -> None:
    """The demonstration data would be built in a folder `s3:`."""
    line = _refused(nvila, tmp_path, "micro", "-o", "data.sources.0.path=s3://bucket/data")
    assert "data.sources.0.path: not a path on this machine" in line


def test_developers_can_ask_for_the_traceback(nvila: Nvila) -> None:
    """One line is too little to mend the platform itself."""
    ended = nvila("--traceback", "run", "no-such-recipe")
    assert "Traceback" in ended.stderr and "ConfigError" in ended.stderr


def test_status_tells_a_script_that_nobody_is_answered(nvila: Nvila, tmp_path: Path) -> None:
    """A script that waits for the endpoint has the exit code, and looking must not leave folders behind."""
    ended = nvila("status")
    assert (ended.returncode, ended.stdout.strip()) == (1, "nothing is served")
    assert list(tmp_path.iterdir()) == []


def test_stop_without_an_endpoint_is_no_error(nvila: Nvila, tmp_path: Path) -> None:
    """`nvila stop` ends every script; it must not fail it nor leave folders behind."""
    ended = nvila("stop")
    assert (ended.returncode, ended.stdout.strip()) == (0, "no endpoint was running")
    assert list(tmp_path.iterdir()) == []


def test_compile_writes_the_file_it_names(nvila: Nvila, tmp_path: Path) -> None:
    """The command of `make compile`. Whoever uploads the file as it is gets pods whose images no registry has."""
    ended = nvila("compile", "lifecycle.yaml")
    assert ended.returncode == 0 and re.fullmatch(r"lifecycle\.yaml: \d+ KiB\n", ended.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["lifecycle.yaml"]
    assert "--image and --quantize-image" in ended.stderr
    named = nvila("compile", "lifecycle.yaml", "--image", "R/base:1", "--quantize-image", "R/quantize:1")
    assert (named.returncode, named.stderr) == (0, "")


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_that_is_shown_is_the_same_recipe(name: str) -> None:
    """Whoever looks before a run would see other values than it takes."""
    whole = recipes.show(name, [])
    assert "extends" not in whole
    assert layers(document(whole)).recipe() == layers(document(name)).recipe()


def test_a_recipe_is_shown_with_where_its_values_come_from(nvila: Nvila, tmp_path: Path) -> None:
    """A value of a recipe far below is looked for in vain in the file at hand."""
    stages = "train: {stages: {train-2: {batch: 64}, train-3: null}}"
    (tmp_path / "mine.yaml").write_text(f"extends: nvila-15b\nname: mine\n{stages}\n")
    shown = nvila("recipe", "show", "mine.yaml", "--override", "seed=3")
    assert shown.returncode == 0, shown.stderr
    found = [line.split("  # ") for line in shown.stdout.splitlines() if "  # " in line]
    sources = {text.strip(): source for text, source in found}
    assert sources["name: mine"] == "mine.yaml"
    assert sources["seed: 3"] == "--override"
    assert sources["batch: 64"] == sources["- null"] == "mine.yaml"
    assert sources["vision_mode: dynamic_s2"] == "nvila-8b"
    assert sources["weight_decay: 0.0"] == "default"


def test_the_shipped_recipes_are_named(nvila: Nvila) -> None:
    """A newcomer looks for what there is to run."""
    listed = nvila("recipe", "list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == shipped()
    assert all(len(line.split()) > 4 for line in listed)


@pytest.mark.parametrize("path", [None, "", "/of/the/user"])
def test_a_run_finds_a_shell_whatever_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    """KFP starts each step with `sh`: services and cron jobs have no PATH, and a virtual environment's may be all."""
    monkeypatch.delenv("PATH") if path is None else monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(local_run, "put_client", lambda folder: None)
    started: list[dict[str, str]] = []

    def start(*words: object, env: dict[str, str], **options: object) -> subprocess.Popen[bytes]:
        started.append(env)
        return popen("exit 7", shell=True, env=env)

    popen = subprocess.Popen
    monkeypatch.setattr(local_run.subprocess, "Popen", start)
    assert local_run._watched(tmp_path, PIPELINES["lifecycle"], tmp_path, Console(quiet=True), local_run._Stop()) == 7
    client, *others = started[0]["PATH"].split(os.pathsep)
    assert Path(client).name.startswith("nvila-") and others == [*([path] if path else []), *os.defpath.split(":")]
