"""`summary.json`: the numbers of one run for programs, gathered from its status files and manifests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from nvila.components.contracts.errors import NvilaError, Preempted, to_record
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import write_atomic
from nvila.components.contracts.meter import METER, Measures, measures
from nvila.components.contracts.pipelines import PipelineName
from nvila.components.contracts.results.accuracy import Evaluation, QuantizedEvaluation
from nvila.components.contracts.results.result import Measured, Result
from nvila.components.contracts.results.run import Resolution, Rollout
from nvila.components.contracts.steps import QUANTIZE, STAGES
from nvila.components.metrics.standing import Compared, Headline, compared, headline
from nvila.components.report.quarantine import Reason, quarantine_file, reasons, set_aside
from nvila.components.runner.status import Run, Status, StepStatus
from nvila.components.tracking.redact import redact_text
from nvila.components.validate.step import DOCS_FILE
from nvila.pipelines.show.versions import product

SUMMARY = "summary.json"
REPORT = "report.html"
LOG = "log.txt"
"""In the run's folder: everything that KFP and the steps print."""


class StepSummary(Result):
    """One step of the run."""

    name: str
    status: Status
    seconds: float
    cached: bool


class Paths(Result):
    """Where things lie, absolute; None where the run did not come to make them."""

    run: str
    log: str
    summary: str
    report: str | None
    weights: str | None
    """Of the last stage that was trained, as it was trained."""
    quantized: str | None
    """The checkpoint that is served."""
    quarantine: str | None = None
    data_docs: str | None = None


class Summary(Result):
    """What `summary.json` holds."""

    schema_version: Literal[3] = 3
    version: str
    """Of this package."""
    run: str
    pipeline: PipelineName = "lifecycle"
    recipe: str | None
    exit_code: Exit
    decision: str
    """What the rollout decided; `rejected`, `preempted` or `failed` where the run did not come that far."""
    message: str | None
    """Why it did not come through."""
    failed_step: str | None
    """Which step ended it early."""
    error: dict[str, Any] | None
    """The same for programs: `kind`, `message`, `where`, `do`, `exit_code` and `details`."""
    paths: Paths
    steps: list[StepSummary]
    quarantine: list[Reason] = []
    """What validation set aside, by source and reason."""
    headline: str
    accuracy: dict[str, Compared]
    """By source."""
    stages: dict[str, dict[str, Measured]]
    """By step and source."""
    training: dict[str, Measures] = {}
    """What each stage measured of itself, by step; of one that the store had, when it was trained."""
    endpoint: str | None
    seconds_total: float
    seconds_overhead: float
    """Of these no step worked."""
    peak_pss_bytes: int


def write_summary(run: Run, seconds_total: float, peak_pss_bytes: int, exit_code: int) -> Summary:
    """Write the run's `summary.json` and return its content."""
    recipe, rollout, evaluation = run.result(Resolution), run.result(Rollout), run.result(Evaluation)
    message, ended_by = _message(run, exit_code), run.trouble or run.lost
    summary = Summary(
        version=product(),
        run=run.name,
        pipeline=run.pipeline.name,
        recipe=recipe.name if recipe else None,
        exit_code=Exit(exit_code),
        decision=_decision(rollout, exit_code),
        message=message,
        failed_step=ended_by.name if ended_by and exit_code != Exit.DONE else None,
        error=_error(ended_by, message, exit_code),
        paths=paths(run),
        steps=[
            StepSummary(
                name=step.name,
                status=step.status,
                seconds=round(step.seconds, 3),
                cached=step.status is Status.CACHED,
            )
            for step in map(run.step, run.pipeline.rows)
        ],
        quarantine=reasons(set_aside(run)),
        headline=verdict(run).text,
        accuracy=compared(evaluation, run.result(QuantizedEvaluation)),
        stages=evaluation.stages if evaluation else {},
        training=training(run),
        endpoint=rollout.endpoint if rollout else None,
        seconds_total=round(seconds_total, 3),
        seconds_overhead=round(max(seconds_total - _work_seconds(run), 0.0), 3),
        peak_pss_bytes=peak_pss_bytes,
    )
    write_atomic(run.folder / SUMMARY, summary.model_dump_json(indent=1) + "\n")
    return summary


def training(run: Run) -> dict[str, Measures]:
    """Of the stages that came through, as far as they measured."""
    made = [(step, Path(run.manifests[step].folder, METER)) for step in STAGES if step in run.manifests]
    return {step: found for step, path in made if (found := measures(path))}


def paths(run: Run) -> Paths:
    """Where what the run made lies, as far as it came."""
    quarantine = quarantine_file(run)
    return Paths(
        run=str(run.folder),
        log=str(run.folder / LOG),
        summary=str(run.folder / SUMMARY),
        report=str(run.folder / REPORT) if (run.folder / REPORT).is_file() else None,
        weights=_model(run, *reversed(STAGES)),
        quantized=_model(run, QUANTIZE),
        quarantine=str(quarantine) if quarantine else None,
        data_docs=str(quarantine.with_name(DOCS_FILE)) if quarantine else None,
    )


def _model(run: Run, *steps: str) -> str | None:
    """The checkpoint of the first of these steps that made one."""
    return next((str(Path(run.manifests[step].folder, "model")) for step in steps if step in run.manifests), None)


def verdict(run: Run) -> Headline:
    """What may be said of the model by what was measured."""
    return headline(run.result(Evaluation), run.result(QuantizedEvaluation))


def _work_seconds(run: Run) -> float:
    """Time inside the steps' own functions: what is left of the whole is overhead. Skipped steps worked 0 s."""
    return sum(
        run.manifests[step.name].seconds if step.status is Status.DONE and step.name in run.manifests else step.seconds
        for step in run.steps.values()
        if step.status is not Status.CACHED
    )


def _decision(rollout: Rollout | None, exit_code: int) -> str:
    if exit_code == Exit.DONE and rollout:
        return rollout.decision
    return {Exit.REJECTED: "rejected", Exit.PREEMPTED: "preempted"}.get(Exit(exit_code), "failed")


def _error(ended_by: StepStatus | None, message: str | None, exit_code: int) -> dict[str, Any] | None:
    """The step's own; else of its kind, for a run that was stopped, killed or lost."""
    if exit_code == Exit.DONE:
        return None
    if ended_by and ended_by.error and ended_by.exit_code == exit_code:
        return ended_by.error
    kind = Preempted if exit_code == Exit.PREEMPTED else NvilaError
    return to_record(kind(message or "ended without a word")) | {"exit_code": exit_code}


def _message(run: Run, exit_code: int) -> str | None:
    """Why the run did not come through: the step's own words, else the last line of the log."""
    if exit_code == Exit.DONE:
        return None
    bad = run.trouble
    if exit_code == Exit.PREEMPTED and bad and bad.exit_code == exit_code:
        return redact_text(f"{bad.name} stopped: {bad.message}")
    if exit_code == Exit.PREEMPTED:
        return "stopped; the same command goes on from here"
    if bad:
        return redact_text(f"{bad.name} {bad.status}: {bad.message}")
    if run.lost:
        why = run.lost.killer(run.folder)
        return f"{run.lost.name} was {why or 'killed before it could say why; too little memory is the usual reason'}"
    log = run.folder / LOG
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((redact_text(line.strip()) for line in reversed(lines) if line.strip()), None)
