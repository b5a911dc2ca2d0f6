"""Step `prune`: scores every SFT sample with DeltaLoss and keeps the top share of each source (paper section 2.3)."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from nvila.components.contracts.children import die_with_parent, forking
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.results.model import PrunedSource, Pruning
from nvila.components.contracts.sealed import fault
from nvila.components.contracts.step import Outcome
from nvila.components.data.fetch import identity
from nvila.components.data.skipped import Skipped, Tally
from nvila.components.prune.select import keep_top


class Settings(Section):
    """Slice of a prune step."""

    prune: PruneSettings
    sources: list[str]
    seed: int
    max_skipped_share: float


def external(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the named reference checkpoints are now, as in `initialize`."""
    return {name: identity(settings["prune"][name]["path"]) for name in ("small", "large")}


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> Outcome:
    """Score and select.

    DeltaLoss of a sample is the loss of its answer under the small reference minus that under the large one, in nats:
    high is informative, near 0 too easy or too hard for both, negative distracting.

    Args:
        settings: references, score, keep ratios.
        inputs: `samples`, and `model` (tower and tokenizer of references that are trained here).
        out: gets `scores.parquet` (id, source, delta, loss_small, loss_large, answer_tokens, kept), `histogram.png`;
            finished references stay in `references/`, so that an interrupted step goes on with the next one.

    Raises:
        DataError: more samples cannot be used than `max_skipped_share` allows; fewer have no score, and do not stay.
        TrainingError: a reference's loss is not finite.
    """
    from nvila.components.prune.references import FOLDS, Work

    if not settings.sources:
        _write([], out / "scores.parquet")
        return Outcome(kind="dataset", result=Pruning(sources={}), files=("scores.parquet",))
    began = time.monotonic()
    jobs = []
    for name, reference in (("small", settings.prune.small), ("large", settings.prune.large)):
        for fold in [None] if reference.path else range(FOLDS):
            jobs.append(
                Work(
                    name=name,
                    reference=reference,
                    fold=fold,
                    base=str(inputs["model"].dir("model")),
                    samples=str(inputs["samples"].path("samples.parquet")),
                    sources=settings.sources,
                    heldout_limit=settings.prune.heldout_questions,
                    seed=settings.seed,
                    max_skipped_share=settings.max_skipped_share,
                    out=str(out / "references" / f"{name}-{fold}.json"),
                )
            )
    # The large ones first: a long job started last would leave the other core idle.
    _make(sorted((job for job in jobs if fault(Path(job.out).parent, job.record)), key=lambda job: job.name))
    small, large = (_results([job for job in jobs if job.name == name]) for name in ("small", "large"))
    # A sample may have a score under one reference only: their tokenizers and limits can differ.
    skipped = {one.id: one for one in (*small["skipped"], *large["skipped"])}
    known = len(small["losses"].keys() | large["losses"].keys() | skipped.keys())
    tally = Tally("prune", known, settings.max_skipped_share, quiet=True)
    tally.add(skipped.values())
    scored = small["losses"].keys() & large["losses"].keys()
    rows = _table({sample: small["losses"][sample] for sample in scored}, large["losses"], settings)
    _write(rows, out / "scores.parquet")
    _plot(rows, out / "histogram.png")
    return Outcome(
        kind="dataset",
        result=Pruning(
            sources=_summary(rows, small["accuracy"], large["accuracy"]),
            score=settings.prune.score,
            skipped=tally.summary(),
        ),
        files=("scores.parquet", "histogram.png"),
        read={"small": small["weights"], "large": large["weights"]},
        measured={"seconds": time.monotonic() - began, "samples": len(rows)},
    )


def _make(jobs: list[Any]) -> None:
    """Make the references in processes of their own, one per core; none of them outlives this call."""
    from nvila.components.model.device import start_method
    from nvila.components.prune.references import work

    if not jobs:
        return
    context = multiprocessing.get_context(start_method())
    processes = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(os.getpid(),)) as pool:
        try:
            with forking():
                made = pool.map(work, jobs)
            list(made)
        except BaseException:
            # Leaving the pool waits for its processes, which may have minutes of work before them.
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _begin(parent: int) -> None:
    """First thing in a reference's process: it ends at once when it is told to, or when the step ends."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    die_with_parent(parent)


def _results(jobs: list[Any]) -> dict[str, Any]:
    """Losses and skipped samples of all folds together; accuracy is the mean over folds."""
    losses: dict[str, Any] = {}
    weights: dict[str, str] = {}
    skipped: list[Skipped] = []
    accuracy: dict[str, list[float]] = {}
    for job in jobs:
        result = json.loads(Path(job.out).read_text())
        losses |= result["losses"]
        weights |= result["weights"]
        skipped += [Skipped(**one) for one in result["skipped"]]
        for source, value in result["accuracy"].items():
            accuracy.setdefault(source, []).append(value)
    means = {source: round(sum(each) / len(each), 4) for source, each in accuracy.items()}
    return {"losses": losses, "weights": weights, "skipped": skipped, "accuracy": means}


def _table(small: Mapping[str, Any], large: Mapping[str, Any], settings: Settings) -> list[dict[str, Any]]:
    rows = []
    for sample in sorted(small):
        loss_small, tokens = small[sample]
        loss_large, tokens_large = large[sample]
        if settings.prune.score == "mean":
            loss_small, loss_large = loss_small / max(1, tokens), loss_large / max(1, tokens_large)
        rows.append(
            {
                "id": sample,
                "source": sample.partition("/")[0],
                "delta": loss_small - loss_large,
                "loss_small": loss_small,
                "loss_large": loss_large,
                "answer_tokens": tokens,
            }
        )
    kept = keep_top(
        [r["id"] for r in rows],
        [r["source"] for r in rows],
        [r["delta"] for r in rows],
        settings.prune.keep_ratio,
        settings.prune.keep_ratio_of,
    )
    return [{**row, "kept": row["id"] in kept} for row in rows]


def _summary(
    rows: list[dict[str, Any]], small: Mapping[str, float], large: Mapping[str, float]
) -> dict[str, PrunedSource]:
    """Per source: counts, and whether the scores mean anything (the large reference must be better held out)."""
    found = {}
    for source in sorted({row["source"] for row in rows}):
        of = [row for row in rows if row["source"] == source]
        found[source] = PrunedSource(
            n=len(of),
            kept=sum(row["kept"] for row in of),
            accuracy_small=small[source],
            accuracy_large=large[source],
            informative=large[source] > small[source],
            mean_delta=round(sum(row["delta"] for row in of) / len(of), 4),
        )
    return found


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    schema = pyarrow.schema(
        {
            "id": "string",
            "source": "string",
            "delta": "float64",
            "loss_small": "float64",
            "loss_large": "float64",
            "answer_tokens": "int64",
            "kept": "bool",
        }.items()
    )
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    sources = sorted({row["source"] for row in rows})
    figure = Figure(figsize=(4 * max(1, len(sources)), 3), layout="constrained")
    for axes, source in zip(figure.subplots(1, len(sources), squeeze=False)[0], sources, strict=True):
        deltas = [[r["delta"] for r in rows if r["source"] == source and r["kept"] is kept] for kept in (True, False)]
        axes.hist(deltas, bins=40, stacked=True, label=["kept", "pruned"])
        axes.set(title=source, xlabel="DeltaLoss (nats)", ylabel="samples", yscale="log")
        axes.legend()
    figure.savefig(path, dpi=100)
