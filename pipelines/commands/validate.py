"""`nvila validate`: a recipe's data alone, by the steps that a run has for them. A later run finds what was done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nvila.components.contracts import jsonlines
from nvila.components.contracts.environment import current, entered
from nvila.components.contracts.errors import DataError
from nvila.components.contracts.recipe.recipe import slices
from nvila.components.contracts.results.run import Resolution
from nvila.components.contracts.steps import PREFLIGHT, RESOLVE, ROWS, VALIDATE
from nvila.components.contracts.store import Store
from nvila.components.data.samples import LABELS_FILE, QUARANTINE_FILE, SAMPLES_FILE
from nvila.components.preflight import checks
from nvila.components.preflight import step as preflight
from nvila.components.runner.execute import identity, perform
from nvila.components.validate.step import DOCS_FILE
from nvila.pipelines.commands.overrides import asked_for

SHOWN = 3
"""Reasons of a source, the commonest first."""


@dataclass(frozen=True)
class Counts:
    """Of one source."""

    good: dict[str, int]
    """By split."""
    spoilt: dict[str, int]
    reasons: dict[str, int]
    """Why records are spoilt, the commonest first."""
    examples: dict[str, str]
    """The first record of each reason, and what was seen of it."""


@dataclass(frozen=True)
class Checked:
    """What came of it."""

    recipe: str
    cached: bool
    """Whether the store had it already."""
    sources: dict[str, Counts]
    quarantine: str
    data_docs: str
    error: DataError | None
    """Why a run would be stopped."""


def check(recipe: str, overrides: Iterable[str], store: Path) -> Checked:
    """Resolve the recipe, look whether its data are there, and validate them; no more of this machine is asked for.

    Raises:
        ConfigError: the recipe is wrong.
        PreflightError: annotation files are missing, or the store cannot be written.
        DataError: annotation files cannot be read.
    """
    form, checked = asked_for(recipe, overrides)
    sources, place = checked.data.sources, Store(store.absolute())
    preflight.refuse(
        checks.disk_problems(0, [place.root]) + checks.data_problems(sources, checked.drawn, demo_can_be_built=True)
    )
    with (
        TemporaryDirectory(prefix="nvila-") as run,
        entered(current().model_copy(update={"store": place.root, "run": Path(run, VALIDATE)})) as here,
    ):
        preflight.prepare(preflight.Settings.model_validate(slices(checked)[PREFLIGHT]))
        preflight.refuse(checks.data_problems(sources, checked.drawn))
        resolved, _ = perform(here, RESOLVE, ROWS[RESOLVE].module, form.model_dump(), {}, tracked=False)
        settings = resolved.told(Resolution).slices[VALIDATE] or {}
        refused = None
        try:
            made, cached = perform(here, VALIDATE, ROWS[VALIDATE].module, settings, {}, tracked=False)
            folder = Path(made.folder)
        except DataError as error:
            key, _ = identity(here, VALIDATE, ROWS[VALIDATE].module, settings, {})
            folder, cached, refused = place.folder(VALIDATE, key), False, error
            if not (folder / DOCS_FILE).is_file():  # it came not as far as to judge
                raise
    return Checked(
        recipe=checked.name,
        cached=cached,
        sources={source.name: _counts(folder, source.name) for source in sources},
        quarantine=str(folder / QUARANTINE_FILE),
        data_docs=str(folder / DOCS_FILE),
        error=refused,
    )


def told(checked: Checked) -> dict[str, Any]:
    """For programs; `error` is left to who raises it."""
    content = asdict(checked)
    del content["error"]
    return content


def render(checked: Checked) -> str:
    """As lines for a terminal."""
    return "\n".join(_lines(checked))


def _lines(checked: Checked) -> Iterator[str]:
    for name, counts in checked.sources.items():
        splits = dict.fromkeys([*counts.good, *counts.spoilt])
        good = (f"{split} {counts.good.get(split, 0):,} of {_whole(counts, split):,}" for split in splits)
        yield f"{name}: good are {', '.join(good)}"
        for reason, number in list(counts.reasons.items())[:SHOWN]:
            yield f"  {number:,} {reason}, as {counts.examples[reason]}"
    yield ""
    yield f"quarantine   {checked.quarantine}"
    yield f"data docs    {checked.data_docs}"
    if checked.cached:
        yield "found in the store: neither files nor rules have changed since"


def _whole(counts: Counts, split: str) -> int:
    return counts.good.get(split, 0) + counts.spoilt.get(split, 0)


def _counts(folder: Path, source: str) -> Counts:
    from pyarrow.compute import field
    from pyarrow.parquet import read_table

    mine = field("source") == source
    good = Counter(read_table(folder / SAMPLES_FILE, columns=["split"], filters=mine)["split"].to_pylist())
    labels = read_table(folder / LABELS_FILE, columns=["source"], filters=mine).num_rows
    spoilt = [record for record in jsonlines.whole(folder / QUARANTINE_FILE) if record["source"] == source]
    reasons = Counter(record["reason"] for record in spoilt)
    return Counts(
        good=dict(good) | ({"labels": labels} if labels else {}),
        spoilt=dict(Counter(record["split"] for record in spoilt)),
        reasons=dict(reasons.most_common()),
        examples={record["reason"]: f"{record['id']}: {record['detail']}" for record in reversed(spoilt)},
    )
