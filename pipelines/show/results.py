"""The last thing `nvila run` prints: the steps, the accuracy, where everything is, and how to ask the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvila.components.contracts import jsonlines
from nvila.components.contracts.environment import current, name_of
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.meter import PROFILE
from nvila.components.contracts.metrics import in_words, named
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.results.accuracy import Evaluation
from nvila.components.contracts.results.result import Measured
from nvila.components.contracts.results.run import Registration, Resolution, Rollout
from nvila.components.contracts.steps import STAGES, VALIDATE
from nvila.components.contracts.surroundings import has_proxy
from nvila.components.contracts.text import shell_word, visible, visible_lines
from nvila.components.metrics.standing import Compared
from nvila.components.runner.status import Run, Status
from nvila.components.tracking.connect import has_store, tracking_uri
from nvila.components.tracking.redact import redact_text
from nvila.pipelines.show.summary import Summary, verdict
from nvila.pipelines.show.watch import StepState, print_line, step_table

_KINDS = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".gif": "gif",
    ".bmp": "bmp",
    ".tif": "tiff",
    ".tiff": "tiff",
}
_BLOCKS = "▁▂▃▄▅▆▇█"
_LARGEST_ARGUMENT_BYTES = 64 * 2**10
"""Of a picture: Linux lets a program have no argument above 128 KiB, and base64 and the question add to it."""


def show_closing(run: Run, summary: Summary, console: Console) -> None:
    """Print the summary of a run that has ended, however it ended."""
    minutes, gib = summary.seconds_total / 60, summary.peak_pss_bytes / 2**30
    title = (
        f"{summary.run}: {summary.decision} after {minutes:.1f} min "
        f"(overhead {summary.seconds_overhead:.1f} s, peak memory {gib:.1f} GiB)"
    )
    steps = [StepState(step.name, step.in_the_end, step.seconds, "") for step in map(run.step, run.pipeline.rows)]
    _print_table(console, title, step_table(steps, notes=False))
    if summary.message:
        print_line(console, f"\n{visible_lines(summary.message)}", style="bold")
    if summary.training:
        _print_table(
            console, "training: loss over the steps, and what each stage measured", _training_table(run, summary)
        )
    if summary.accuracy:
        found = verdict(run)
        colour = "green" if found.good and summary.exit_code == Exit.DONE else "yellow"
        print_line(console, f"\n{visible(found.text)}", style=f"bold {colour}")
    if summary.accuracy:
        words = in_words(m.full.metric for m in summary.accuracy.values())
        title = f"{words} on held-out data (95% interval), beside what a model reaches without looking"
        _print_table(console, title, _accuracy_table(summary.accuracy))
    if summary.stages:
        words = in_words(m.metric for stage in summary.stages.values() for m in stage.values())
        _print_table(console, f"{words} before training and after each stage", _stage_table(summary.stages))
    console.print()
    if gates := _open_gates(run):
        print_line(console, f"{'gates':<12} {gates}")
    for label, value in _places(run, summary):
        print_line(console, f"{label:<12} {visible(value)}")
    if summary.endpoint and (example := curl_example(run)):
        console.print("\nask the served model about a picture:")
        print_line(console, example)


def _open_gates(run: Run) -> str:
    resolved = run.result(Resolution)
    try:
        return Recipe.model_validate(resolved.recipe).open_gates if resolved else ""
    except ValidationError:  # of a run of another version
        return ""


def curl_example(run: Run) -> str | None:
    """A shell command that asks the endpoint a held-out question about its picture; None where no question has one.

    Names and questions come from the user's data. The body stands in single quotes, in which a shell reads nothing, and
    no quote is left in it; base64 writes nothing that a shell would split or read.
    """
    from nvila.components.model.text.conversation import Turn, messages_of

    held_out, served = _held_out(run), run.result(Rollout)
    if held_out is None or served is None or served.endpoint is None:
        return None
    picture, question = held_out
    url = {"url": f"data:image/{_KINDS.get(picture.suffix.lower(), 'png')};base64,"}
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": url}
        for part in messages_of([Turn("human", question)], [picture])[0].parts
        if part
    ]
    body = {"messages": [{"role": "user", "content": content}], "model": served.model, "temperature": 0}
    text = _quoted(body)
    before, after = text.split(_quoted(url), 1)  # its quotes are escaped wherever a question says the same
    opening, closing = _quoted(url)[:-2], _quoted(url)[-2:]
    start, picture_in_base64, end = (
        f"'{before}{opening}'",
        f"base64 -w0 -- {shell_word(short(picture))}",
        f"'{closing}{after}'",
    )
    key = f'-H "Authorization: Bearer ${name_of("api_key")}" ' if current().api_key else ""
    address = shell_word(f"{served.endpoint.rstrip('/')}/v1/chat/completions")
    directly = "--noproxy '*' " if has_proxy() else ""
    command = f"curl -s {directly}{address} {key}-H 'Content-Type: application/json' -d"
    if picture.is_file() and picture.stat().st_size > _LARGEST_ARGUMENT_BYTES:
        return f"{{ printf %s {start}; {picture_in_base64}; printf %s {end}; }} | {command} @-"
    return f"{command} {start}$({picture_in_base64}){end}"


def _quoted(content: Any) -> str:
    """JSON that may stand in a shell's single quotes."""
    return json.dumps(content, separators=(",", ":")).replace("'", "\\u0027").replace("\x7f", "\\u007f")


def _held_out(run: Run) -> tuple[Path, str] | None:
    """A held-out picture and its question as the record has it, from the source that the model answers best."""
    from nvila.components.data.samples import SAMPLES_FILE, read_samples

    table = run.file(VALIDATE, SAMPLES_FILE)
    samples = read_samples(table, split="heldout") if table else []
    pictures = {sample.source: sample for sample in samples if sample.kind == "image" and len(sample.media) == 1}
    if not pictures:
        return None
    evaluation = run.result(Evaluation)
    measured = evaluation.accuracy if evaluation else {}
    best = pictures[max(pictures, key=lambda source: measured[source].value if source in measured else 0.0)]
    return best.root / best.media[0], best.conversations[0].text


def _accuracy_table(accuracy: Mapping[str, Compared]) -> Table:
    table = Table(box=None, pad_edge=False)
    tuned = any(m.base for m in accuracy.values())
    for column in ("source", "n", "majority", "question only", *(("base",) if tuned else ()), "trained", "quantized"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for source, m in accuracy.items():
        table.add_row(
            Text(visible(named(source, m.full.metric))),
            str(m.full.n),
            f"{m.majority.value:.3f}",
            f"{_interval(m.question_only)} {m.question_only.kind}",
            *((_interval(m.base),) if tuned else ()),
            _interval(m.full),
            _interval(m.quantized),
        )
    return table


def profiles(run: Run, wanted: str) -> list[str]:
    """Where the profiles of these training steps (one, or `all`) lie; of a step that was not trained, that."""
    lines = []
    for step in STAGES if wanted == "all" else filter(None, [wanted]):
        made = run.manifests.get(step)
        trace = Path(made.folder, PROFILE) if made else None
        if trace and trace.is_file():
            where = short(trace)
        elif run.step(step).status is Status.CACHED:
            where = f"none: the store had {step}, so nothing was trained (a fresh --store trains it again)"
        else:
            where = f"none: {step} was not trained"
        lines.append(f"{'profile':<12} {visible(where)}")
    return lines


def _training_table(run: Run, summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "loss", "", ""):
        table.add_column(column, no_wrap=True, overflow="ellipsis")
    for step, found in summary.training.items():
        path = run.file(step, "loss.jsonl")
        losses = [record["loss"] for record in jsonlines.whole(path) if "loss" in record] if path else []
        known = [loss for loss in losses if loss is not None]
        ends = f"{known[0]:.3f} to {known[-1]:.3f}" if known else ""
        table.add_row(step, spark(losses), ends, ", ".join(found.words))
    return table


def spark(values: Sequence[float | None], width: int = 24) -> str:
    """A line of at most `width` blocks from 0 to the largest of their means; a gap where there is no value."""
    width = max(1, min(width, len(values)))
    parts = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
    known = [[value for value in part if value is not None] for part in parts]
    means = [sum(part) / len(part) if part else None for part in known]
    most = max((mean for mean in means if mean is not None), default=0) or 1
    return "".join(" " if mean is None else _BLOCKS[max(0, math.ceil(8 * mean / most) - 1)] for mean in means)


def _stage_table(stages: Mapping[str, Mapping[str, Measured]]) -> Table:
    sources = sorted({source for row in stages.values() for source in row})
    table = Table(box=None, pad_edge=False)
    table.add_column("after")
    for source in sources:
        table.add_column(Text(visible(source)), justify="right")
    for stage, row in stages.items():
        table.add_row(
            Text(visible(stage)), *(f"{row[source].value:.3f}" if source in row else "" for source in sources)
        )
    return table


def _places(run: Run, summary: Summary) -> list[tuple[str, str]]:
    runs, there = run.folder.parent, summary.paths
    named = {
        "log": there.log,
        "numbers": there.summary,
        "report": there.report,
        "weights": there.weights,
        "quantized": there.quantized,
        "quarantine": there.quarantine,
        "data docs": there.data_docs,
    }
    places = [(label, short(Path(path))) for label, path in named.items() if path]
    if has_store(runs):
        ours = f" (`{_with_runs('nvila ui', runs)}` shows it)" if current().mlflow_tracking_uri is None else ""
        places.append(("MLflow", f"{redact_text(tracking_uri(runs))}{ours}"))
    if version := run.result(Registration):
        places.append(("registered", f"{version.name} version {version.version}"))
    if summary.endpoint:
        places.append(("endpoint", f"{summary.endpoint} (`{_with_runs('nvila stop', runs)}` ends it)"))
    return places


def _with_runs(command: str, runs: Path) -> str:
    """The command as it is to be typed here, for this folder of runs."""
    return command if runs == Path("runs").absolute() else f"{command} --runs {shell_word(short(runs))}"


def _print_table(console: Console, title: str, table: Table) -> None:
    """The title on a line of its own: a table's own title wraps at the table's width."""
    print_line(console, f"\n{visible(title)}", style="bold")
    console.print(table)


def _interval(measured: Measured | None) -> str:
    return f"{measured.value:.3f} ({measured.low:.3f}-{measured.high:.3f})" if measured else "-"


def short(path: Path) -> str:
    """Relative to the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
