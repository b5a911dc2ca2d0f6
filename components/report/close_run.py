"""What is left to do when a pipeline run on a cluster has ended: cancel its jobs, end it in MLflow, tell a webhook.

Nothing here changes how the run ended: what fails is said and left. `nvila run` closes the runs of its own machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvila.components.contracts.environment import Environment, revealed
from nvila.components.contracts.files import read_json
from nvila.components.contracts.results.accuracy import Evaluation, QuantizedEvaluation
from nvila.components.contracts.results.run import Ending, Registration, Resolution
from nvila.components.metrics.standing import compared, headline
from nvila.components.report.ending import as_line, ending
from nvila.components.report.webhook import post
from nvila.components.runner.execute import Place
from nvila.components.runner.status import Run
from nvila.components.runner.work import launcher_of
from nvila.components.tracking.redact import redact, tell

_MLFLOW = {"succeeded": "FINISHED", "stopped": "KILLED"}


def close(state: str, message: str | None, here: Environment) -> None:
    """Close the run that this process belongs to.

    Args:
        state: what KFP says of the run (see `ending`).
        message: what KFP adds to that.
        here: of this process.
    """
    if not here.on_cluster:
        return
    run_dir = Place.of(here).run_dir
    _try("jobs of this run may go on", _cancel_jobs, run_dir, here)
    run = Run.read(run_dir)
    ended = ending(run, state, message)
    print(as_line(ended), flush=True)
    _try("the run in MLflow stays open", _end_tracking, run_dir, ended)
    if url := revealed(here.webhook_url).strip():
        _try("the webhook was not told", _notify, url, run_dir, run, ended, revealed(here.webhook_secret).strip())


def notice(run_dir: Path, run: Run, ended: Ending) -> dict[str, Any]:
    """What the webhook is told, without secrets."""
    began, last = run.span
    full, quantized = run.result(Evaluation), run.result(QuantizedEvaluation)
    recipe, version = run.result(Resolution), run.result(Registration)
    return dict(
        redact(
            {
                "run": run.name,
                "outcome": ended.outcome,
                "step": ended.step,
                "message": ended.message,
                "recipe": recipe.name if recipe else None,
                "seconds": round(last - began, 1),
                "headline": headline(full, quantized).text,
                "accuracy": {source: m.model_dump() for source, m in compared(full, quantized).items()},
                "registered": version.model_dump(include={"name", "version"}) if version else None,
                "links": _links(run_dir),
            }
        )
    )


def _cancel_jobs(run_dir: Path, here: Environment) -> None:
    if launcher := launcher_of(here):
        launcher.close(run_dir.name, here)


def _end_tracking(run_dir: Path, ended: Ending) -> None:
    from nvila.components.tracking.runs import close_pipeline_run, is_tracked

    if is_tracked(run_dir):  # else no step was tracked, or the parent is KFP's
        close_pipeline_run(run_dir, _MLFLOW.get(ended.outcome, "FAILED"))


def _notify(url: str, run_dir: Path, run: Run, ended: Ending, secret: str) -> None:
    post(url, f"run.{ended.outcome}", notice(run_dir, run, ended), secret)


def _links(run_dir: Path) -> dict[str, str]:
    """Where to look: the report on the shared volume, and the run in MLflow where that has a server."""
    from nvila.components.tracking.runs import PARENT_FILE

    found = {"report": str(run_dir / "report.html")} if (run_dir / "report.html").is_file() else {}
    parent = read_json(run_dir / PARENT_FILE)
    uri = str(parent.get("tracking_uri", ""))
    if uri.startswith(("http://", "https://")):
        path = f"/#/experiments/{parent.get('experiment_id')}/runs/{parent.get('run_id')}"
        found["mlflow"] = uri.rstrip("/") + path
    return found


def _try(consequence: str, do: Callable[..., None], *arguments: Any) -> None:
    try:
        do(*arguments)
    except Exception as problem:
        print(tell(f"{consequence}: {type(problem).__name__}: {problem}"), file=sys.stderr, flush=True)
