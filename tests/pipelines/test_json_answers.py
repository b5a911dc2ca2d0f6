"""`--json`: one object on stdout, whatever a command is asked and whatever becomes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from nvila.pipelines.show import as_json

if TYPE_CHECKING:
    from conftest import Nvila


@pytest.mark.parametrize(
    ("words", "kind", "code"),
    [
        ("plan nosuch", "ConfigError", 2),
        ("run", "ConfigError", 2),  # an argument is missing
        ("run micro --overide a=1", "ConfigError", 2),  # no such option
        ("run micro -o seed=x", "ConfigError", 2),
        ("validate micro -o data.sources.0.path=nowhere -o data.sources.0.demo=null", "PreflightError", 2),
        ("infer champion what?", "ConfigError", 2),
        ("inspect champion", "ConfigError", 2),
        ("trace champion", "ConfigError", 2),
        ("serve champion", "ConfigError", 2),
        ("recipe list", "ConfigError", 2),  # which has no such option
    ],
)
def test_an_error_is_one_object(nvila: Nvila, words: str, kind: str, code: int) -> None:
    """Agents and scripts read stdout; a sentence there, or none at all on a mistyped option, is a crash of theirs."""
    ended = nvila(*words.split(), "--json")
    error = json.loads(ended.stdout)["error"]
    assert (error["kind"], error["exit_code"], ended.returncode) == (kind, code, code)
    assert error["message"] and set(error) == {"kind", "message", "where", "do", "exit_code", "details"}


def test_what_succeeds_is_one_object(nvila: Nvila) -> None:
    """The same where nothing is wrong."""
    ended = nvila("stop", "--json")
    assert (json.loads(ended.stdout), ended.returncode) == ({"stopped": []}, 0)


PROGRAM = """
import os, sys
from nvila.pipelines.show import as_json
def command():
    print("a library's line")
    os.system("echo a child")
    as_json.put({"token": "password=hunter22", "odd": "\\u202e"})
    {ending}
sys.exit(as_json.run(command))
"""


@pytest.mark.parametrize("ending", ["return 3", "raise ValueError('oops')", "return 130"])
def test_nothing_else_comes_to_stdout(ending: str) -> None:
    """Lines of libraries and child processes made the answer unreadable; faults of ours have to be readable, too."""
    command = [sys.executable, "-c", PROGRAM.replace("{ending}", ending)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    told: dict[str, Any] = json.loads(ended.stdout)
    assert ended.stdout.isascii() and "hunter22" not in ended.stdout and told["odd"] == "\u202e"
    assert "a library's line" in ended.stderr and "a child" in ended.stderr
    kinds = {3: None, 1: "ValueError", 75: "Preempted"}
    assert told.get("error", {}).get("kind") == kinds[ended.returncode]
    assert ("Traceback" in ended.stderr) == (ended.returncode == 1)


def test_an_option_behind_the_options_is_a_text() -> None:
    """A question may be called like an option."""
    assert as_json.wanted(["infer", "m", "--json"]) and not as_json.wanted(["infer", "m", "--", "--json"])


def test_versions_are_told_without_importing(nvila: Nvila) -> None:
    """The first thing that a report of a fault has to say, and torch takes ten seconds to say it."""
    told = dict(line.split() for line in nvila("--version").stdout.splitlines())
    assert list(told) == ["nvila", "python", "torch", "vllm"] and told["torch"][0].isdigit()


def test_the_ui_needs_a_folder_with_runs(nvila: Nvila, tmp_path: Path) -> None:
    """MLflow would make an empty store where it is told, and show that there is nothing."""
    ended = nvila("ui", "--runs", "nowhere")
    assert ended.returncode == 2 and "nowhere" in ended.stderr and not list(tmp_path.iterdir())
