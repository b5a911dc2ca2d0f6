"""Writes the documents' tables from the code they describe: `make docs`. A test compares them and catches drift."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from nvila.components.contracts.environment import Environment, set_by
from nvila.components.contracts.manifest import write_atomic
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.reader import shipped, shipped_document
from nvila.components.contracts.site import Site
from nvila.components.contracts.steps import INITIALIZE, STAGES, STEPS, nearest
from nvila.components.report.flow import lanes
from nvila.pipelines.cli import app
from nvila.pipelines.commands.schema import every_key
from nvila.pipelines.planning import matrix
from nvila.pipelines.show.chart import CHART, apis_rows, values_rows

FIRST = ("tiny", "micro")
"""Recipes that a newcomer meets first; the others follow by name."""


def flow() -> str:
    """The steps from top to bottom; what may run beside the longest way has a lane of its own."""
    shown, before = [row for row in STEPS if not row.at_exit], nearest()
    lane, at = lanes(shown), {row.name: index for index, row in enumerate(shown)}
    width = max(len(row.name) for row in STEPS)
    lines = []
    for row in STEPS:
        cells = [" "] * (2 * max(lane.values()) + 1)
        for branch in [name for name in lane if lane[name]]:
            starts = [at[name] for name in before[branch]]
            ends = [at[name] for name in lane if branch in before[name]]
            here, column = at.get(row.name, len(at)), 2 * lane[branch]
            if min(starts) < here < max(ends):
                cells[column] = "|"
            elif here in (*starts, *ends):
                cells[1:column] = ["-" if cell == " " else cell for cell in cells[1:column]]
                cells[column] = "+"
        if row.name in lane:
            cells[2 * lane[row.name]] = "o"
            if lane[row.name]:
                cells[0] = "|"
        lines.append(f"{''.join(cells)}  {row.name:{width}}  {row.remark}")
    return "\n".join(["```", *lines, "```"])


def steps_table() -> str:
    """Each task of the DAG in reading order: what it does, what it waits for, and where its code is."""
    before, rows = nearest(), []
    for row in STEPS:
        after = "all, however they end" if row.at_exit else ", ".join(f"`{name}`" for name in before[row.name])
        path = f"{row.folder}/step.py"
        rows.append((f"`{row.name}`", row.about, after, f"[{path}](components/{path})"))
    return table(("step", "what it does", "after", "code"), rows)


def recipes_table() -> str:
    """Each shipped recipe: the first sentence of its file, and the language or whole model that it starts from."""
    rows = []
    for name in (*FIRST, *(name for name in shipped() if name not in FIRST)):
        base = fill_in(Form(recipe=name)).model.base
        sentence = shipped_document(name).about
        start = f"`{base.model or base.llm}`" if base.model or base.llm else f"blank, made by `{INITIALIZE}`"
        rows.append((f"[`{name}`](pipelines/recipes/{name}.yaml)", sentence, start))
    return table(("recipe", "what it is", "starts from"), rows)


def commands_table() -> str:
    """Each command of the CLI: the first line of its help and its example."""
    rows = []
    for name, command in commands():
        first, _, rest = (command.help or "").partition("\n")
        example = re.search(r"Example: (.+)", rest)
        rows.append((f"`nvila {name}`", first, f"`{example[1]}`" if example else ""))
    return table(("command", "what it does", "example"), rows)


def commands(group: Any = None, above: str = "") -> Iterator[tuple[str, Any]]:
    """Every command of the CLI by its words."""
    found: Any = group or typer.main.get_command(app)
    for name, command in found.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


def variables_table() -> str:
    """Each variable of the environment: what it says, who sets it, and what holds without it."""
    rows = []
    for field, by in zip(Environment.model_fields.values(), set_by().values(), strict=True):
        default = "" if field.default in (None, "") else f"`{field.default}`"
        rows.append((f"`{field.alias}`", str(field.description), ", ".join(by), default))
    return table(("variable", "what it says", "set by", "else"), rows)


def site_table() -> str:
    """Each field of the JSON value `NVILA_SITE`."""
    rows = [
        (f"`{name}`", str(Site.model_fields[name].description), "" if value == "" else f"`{value}`")
        for name, value in Site().model_dump(mode="json").items()
    ]
    return table(("field", "what it says", "else"), rows)


def keys_table() -> str:
    """Each key of a recipe: what it may be, what holds without it, and what it is for."""
    rows = [
        (f"`{path}`", kind, default and f"`{default}`", " ".join(about.split()))
        for path, kind, default, about in every_key()
    ]
    return table(("key", "what it may be", "else", "what it is for"), rows)


def values_table() -> str:
    """What each stage is in the paper's recipe and in the reference's, a row for each of them."""
    both = {recipe: fill_in(Form(recipe=recipe)) for recipe in ("nvila-8b", "nvila-8b-reference")}
    rows = []
    for index, step in enumerate(STAGES):
        for name, recipe in both.items():
            stage, model = recipe.train.stages[index], recipe.model_at(index)
            assert stage is not None
            pools = " and ".join(" x ".join(map(str, pool)) for pool in model.video.pool_sizes)
            clip = "none" if stage.clip_norm is None else f"{stage.clip_norm:g}"
            cells = (", ".join(stage.trainable), f"{stage.learning_rate:g}", f"{stage.batch:,}", clip)
            limit = min(stage.max_length_tokens, model.max_length_tokens)
            rest = (f"{limit:,}", f"{model.video.frames}, {pools}", str(recipe.time_tokens_at(index) or "none"))
            rows.append((f"`{step}`", f"`{name}`", *cells, *rest))
    head = ("stage", "recipe", "trained", "learning rate", "batch", "clip norm", "longest row", "frames, pooling")
    return table((*head, "time tokens"), rows)


def matrix_table() -> str:
    """Which ways of training go together, and the rules behind it."""
    head, *lines = matrix.grid()
    numbered = "\n".join(f"{number}. {why}" for number, why in matrix.rules())
    return f"{matrix.summary()}.\n\n{table(head, lines)}\n\n{numbered}"


def chart_table() -> str:
    """Each value of the chart."""
    return table(("value", "else", "what it is for"), values_rows())


def apis_table() -> str:
    """What each part of the chart needs of a cluster, for `helm template`."""
    return table(("part", "`--api-versions`"), apis_rows())


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"flow": flow, "steps": steps_table, "recipes": recipes_table, "commands": commands_table},
    "docs/recipe.md": {"keys": keys_table},
    "docs/stages.md": {"values": values_table, "matrix": matrix_table},
    "docs/environment.md": {"variables": variables_table, "site": site_table},
    f"{CHART}/README.md": {"apis": apis_table, "chart": chart_table},
}
"""By document, and by the name of the markers `<!-- steps -->` and `<!-- /steps -->` around the table."""


def fill(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """`text` with every one of these tables between its markers made anew.

    Raises:
        ValueError: a pair of markers is missing.
    """
    for name, made in tables.items():
        start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
        head, opened, rest = text.partition(start)
        _, closed, tail = rest.partition(end)
        if not opened or not closed:
            raise ValueError(f"no markers for the table {name!r}")
        text = head + start + made() + end + tail
    return text


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


if __name__ == "__main__":
    for name in TABLES:
        write_atomic(Path(name), fill(Path(name).read_text(encoding="utf-8"), TABLES[name]))
