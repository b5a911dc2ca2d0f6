"""Step `prune`: gives every SFT sample a score by the recipe's method and keeps the top share of each group (paper,
section 2.3)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import DataError
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.prune import JUDGED, Method, PruneSettings
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.results.model import Judged, PrunedSource, Pruning
from nvila.components.contracts.step import Outcome
from nvila.components.contracts.text import say
from nvila.components.data.samples import read_limits, sample_batches
from nvila.components.data.skipped import Skipped, Tally
from nvila.components.prune import work
from nvila.components.tracking.checkpoints import fetch_version, identity

if TYPE_CHECKING:
    from nvila.components.prune import table
    from nvila.components.prune.groups import Grouping

PIECES = "work"
"""Folder of what an interrupted step has finished."""


class Settings(Section):
    """Slice of a prune step."""

    prune: PruneSettings
    sources: list[str]
    seed: int
    max_skipped_share: float


def external(settings: Mapping[str, Any], here: Environment) -> dict[str, Any]:
    """What the named reference checkpoints are now, as in `initialize`; of the registry's the digest of the model."""
    prune = PruneSettings.model_validate(settings["prune"])
    asked = prune.references if settings["sources"] else {}
    return {name: identity(reference.path, here.run_folder.parent) for name, reference in asked.items()}


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path, here: Environment) -> Outcome:
    """Score and select.

    Groups in which the references prove nothing on held-out questions are not scored: they stay whole, or a random
    share of them does.

    Args:
        settings: method, references, groups, keep ratios.
        inputs: `samples`, and `model` (tower and tokenizer of references that are trained here).
        out: gets `scores.parquet` (columns as in `table.SCHEMA`) and `histogram.png`; finished pieces of work stay in
            `work/` until the end, so that an interrupted step goes on with the next one.
        here: tells where the registry is.

    Raises:
        DataError: more samples cannot be used than `max_skipped_share` allows; fewer have no score, and do not stay.
            Or the composition moves farther than the recipe allows.
        TrainingError: a reference's loss is not finite.
    """
    from nvila.components.prune import table
    from nvila.components.prune.groups import Grouping

    began, prune = time.monotonic(), settings.prune
    if not settings.sources:
        table.empty(out / "scores.parquet")
        return Outcome(kind="dataset", result=Pruning(sources={}, method=prune.method), files=("scores.parquet",))
    runs = here.run_folder.parent
    versions = {name: fetch_version(one.path, runs) for name, one in prune.references.items() if one.path}
    job = work.Job(
        prune=prune,
        sources=settings.sources,
        seed=settings.seed,
        max_skipped_share=settings.max_skipped_share,
        samples=inputs["samples"].path("samples.parquet"),
        base=inputs["model"].dir("model"),
        weights={name: folder for name, (folder, _) in versions.items()},
        clusters="clusters" in prune.methods,
        folder=out / PIECES,
    )
    told = ["id", "source", "question", "answer", "fields"]
    grouping = Grouping.fit(partial(_rows, job, told), prune, settings.seed)
    known = table.Table.of(_rows(job, told), grouping)
    if not len(known):
        raise DataError(
            f"no SFT sample of {', '.join(settings.sources)} to prune",
            where=str(job.samples),
            do="Bring samples, or leave the sources out of the stages that are pruned.",
        )
    measured = {"samples": float(len(known))}
    judged = _judge(job, grouping, measured)
    tally = Tally("prune", len(known), settings.max_skipped_share, quiet=True)
    tally.add(_score(job, known, judged, measured))
    known.decide(believed(judged, prune.method), prune, settings.seed)
    sources, shifted = _described(job, known)
    known.write(_rows(job, ["id", "answer"]), out / "scores.parquet")
    table.plot(known, out / "histogram.png")
    shutil.rmtree(job.folder, ignore_errors=True)
    return Outcome(
        kind="dataset",
        result=Pruning(
            sources=sources,
            groups=known.groups(),
            judged=judged,
            method=prune.method,
            score=prune.score,
            shifted=shifted,
            skipped=tally.summary(),
        ),
        files=("scores.parquet", "histogram.png"),
        read={name: versions[name][1] if name in versions else {} for name in prune.references},
        measured=measured | {"seconds": time.monotonic() - began},
    )


def believed(judged: Mapping[str, Judged], method: Method) -> set[str]:
    """The kinds of question in which a method's references have proved themselves."""
    from nvila.components.prune.judge import believed as fine

    return {kind for kind, told in judged.items() if fine(told, method)}


def _rows(job: work.Job, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """The SFT samples of the step, shard by shard."""
    return sample_batches(job.samples, work.SHARD_SAMPLES, split="sft", sources=job.sources, columns=columns)


def _judge(job: work.Job, grouping: Grouping, measured: dict[str, float]) -> dict[str, Judged]:
    """Make the references, and hold them against each other on held-out questions."""
    from nvila.components.prune import heldout, through_vllm
    from nvila.components.prune.judge import LEAST_QUESTIONS, judge

    if not job.prune.references:
        return {}
    began, ranks = time.monotonic(), work.ranks_here(job.prune.gpus)
    asked = heldout.questions(job, grouping)
    every = [sample for samples in asked.values() for sample in samples]
    told: list[heldout.Told] = []
    # Where no kind has enough questions to prove anything, references are not worth their training.
    if any(len(samples) >= LEAST_QUESTIONS for samples in asked.values()):
        # The large ones first: a long piece started last would leave the other core idle.
        folds = [fold for fold in job.folds if fold is not None]
        work.crew([partial(work.train, job, fold, name) for name in sorted(job.trained) for fold in folds], ranks)
        measured["references_seconds"], began = time.monotonic() - began, time.monotonic()
        parts = [every[part::ranks] for part in range(ranks) if every[part::ranks]]
        told += work.crew([partial(work.answer, job, fold, part) for fold in job.folds for part in parts], ranks)
        told += [through_vllm.answer(job, every)] if job.served else []
        measured["judging_seconds"] = time.monotonic() - began
    known = heldout.commonest(_rows(job, ["source", "question", "answer"]), every)
    return judge(heldout.answered(asked, told), known, job.prune.judged_by)


def _score(
    job: work.Job, known: table.Table, judged: Mapping[str, Judged], measured: dict[str, float]
) -> list[Skipped]:
    """Fill the table with losses and clusters; the samples that cannot be used."""
    import numpy as np

    from nvila.components.prune import through_vllm

    began, ranks = time.monotonic(), work.ranks_here(job.prune.gpus)
    fine = set().union(*(believed(judged, method) for method in job.prune.methods if method in JUDGED))
    wanted = known.of_kinds(fine)
    if not wanted.any() and not job.clusters:
        return []
    job.folder.mkdir(parents=True, exist_ok=True)
    np.save(job.folder / "wanted.npy", wanted)
    centres = work.crew([partial(work.centres, job)], 1)[0] if job.clusters else {}
    shards = -(-len(known) // work.SHARD_SAMPLES)
    ranks = min(ranks, shards)
    tasks = [partial(work.score, job, rank, ranks, job.folder / "wanted.npy", centres) for rank in range(ranks)]
    places = sorted(place for some in work.crew(tasks, ranks) for place in some)
    skipped = known.fill(_rows(job, ["id"]), map(work.read_shard, places))
    if job.served:
        skipped += known.fill(_rows(job, ["id"]), through_vllm.score(job, wanted))
    measured["scoring_seconds"] = time.monotonic() - began
    measured["scored_per_second"] = float(wanted.sum()) / measured["scoring_seconds"]
    return skipped


def _described(job: work.Job, known: table.Table) -> tuple[dict[str, PrunedSource], list[str]]:
    """What each source was and is made of, and in words what moved farther than the recipe allows.

    Raises:
        DataError: it moved, and the recipe refuses that.
    """
    from nvila.components.prune.composition import makeup, moved

    assert known.decision is not None
    kept = known.decision.kept
    rows = _rows(job, ["source", "kind", "root", "media", "media_sha256", "answer"])
    made = makeup(rows, kept, read_limits(job.samples))
    told = known.categories(_rows(job, ["id"]))
    found = {}
    for number, source in enumerate(known.columns.sources):
        mine = known.columns.source == number
        found[source] = PrunedSource(
            n=int(mine.sum()),
            kept=int(kept[mine].sum()),
            composition=made[source],
            categories=told[source][0],
            examples=told[source][1],
        )
    shifted = moved(made, job.prune.largest_shift)
    for line in shifted:
        say(f"pruning: {line}")
    if shifted and job.prune.on_shift == "refuse":
        raise DataError(
            "pruning would change what the data are made of: " + "; ".join(shifted),
            where="prune",
            do="Group what belongs together (prune.within), or raise prune.largest_shift.",
        )
    return dict(sorted(found.items())), shifted
