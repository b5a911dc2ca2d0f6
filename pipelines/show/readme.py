"""Writes the README's tables from the code they describe: `make docs`. A test compares them and catches drift."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
from google.protobuf import json_format

from nvila.components.contracts.manifest import write_atomic
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.reader import shipped, shipped_document
from nvila.pipelines.cli import app
from nvila.pipelines.lifecycle import build
from nvila.pipelines.steps import STEPS

FIRST = ("tiny", "micro")
"""Recipes that a newcomer meets first; the others follow by name."""


def steps_table() -> str:
    """Each task of the DAG in reading order: what it does, what it waits for, and where its code is."""
    spec = json_format.MessageToDict(build().pipeline_spec)
    tasks = dict(_tasks(spec))
    before = {name: set(tasks[name].get("dependentTasks", [])) & set(STEPS) for name in STEPS}
    rows = []
    for name, sentence in STEPS.items():
        after = ", ".join(f"`{step}`" for step in _nearest(name, before))
        exit_task = "triggerPolicy" in tasks[name]
        rows.append((f"`{name}`", sentence, "all, however they end" if exit_task else after, _code(spec, tasks[name])))
    return _table(("step", "what it does", "after", "code"), rows)


def recipes_table() -> str:
    """Each shipped recipe: the first sentence of its file, and the language model that it starts from."""
    rows = []
    for name in (*FIRST, *(name for name in shipped() if name not in FIRST)):
        llm = fill_in(Form(recipe=name)).model.base.llm
        sentence = shipped_document(name).about
        start = f"`{llm}`" if llm else "blank, made by `base`"
        rows.append((f"[`{name}`](pipelines/recipes/{name}.yaml)", sentence, start))
    return _table(("recipe", "what it is", "language model"), rows)


def commands_table() -> str:
    """Each command of the CLI: the first line of its help and its example."""
    rows = []
    for name, command in commands():
        first, _, rest = (command.help or "").partition("\n")
        example = re.search(r"Example: (.+)", rest)
        rows.append((f"`nvila {name}`", first, f"`{example[1]}`" if example else ""))
    return _table(("command", "what it does", "example"), rows)


def commands(group: Any = None, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every command of the CLI by its words."""
    found: Any = group or typer.main.get_command(app)
    for name, command in found.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


TABLES = {"steps": steps_table, "recipes": recipes_table, "commands": commands_table}
"""By the name of the markers `<!-- steps -->` and `<!-- /steps -->` around the table."""


def fill(text: str) -> str:
    """`text` with every table between its markers made anew.

    Raises:
        ValueError: a pair of markers is missing.
    """
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        head, opened, rest = text.partition(start)
        _, closed, tail = rest.partition(end)
        if not opened or not closed:
            raise ValueError(f"no markers for the table {name!r}")
        text = head + start + table() + end + tail
    return text


def _tasks(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every task of the pipeline and of the pipelines inside it."""
    for dag in (spec["root"], *spec["components"].values()):
        yield from dag.get("dag", {}).get("tasks", {}).items()


def _nearest(name: str, before: Mapping[str, set[str]]) -> list[str]:
    """The steps that a step waits for, less those that these wait for themselves; in reading order."""

    def all_before(step: str) -> set[str]:
        return before[step].union(*(all_before(other) for other in before[step]))

    implied = set().union(*(all_before(step) for step in before[name]))
    return [step for step in STEPS if step in before[name] - implied]


def _code(spec: dict[str, Any], task: dict[str, Any]) -> str:
    """Link to the step module that the task's wrapper names."""
    executor = spec["components"][task["componentRef"]["name"]]["executorLabel"]
    source = "".join(spec["deploymentSpec"]["executors"][executor]["container"]["command"])
    named = re.search(r'execute\(step, "nvila\.([\w.]+)"', source)
    assert named, f"the wrapper of {executor} names no step module"
    path = named[1].replace(".", "/") + ".py"
    return f"[{path.removeprefix('components/')}]({path})"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        write_atomic(Path(argument), fill(Path(argument).read_text(encoding="utf-8")))
