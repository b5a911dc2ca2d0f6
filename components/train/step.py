"""Step `train`: runs one row of the stage table from the previous model, and plots its loss."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.meter import METER, measures
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.recipe.train import KEPT, SHARED_OUT, Run, Stage
from nvila.components.contracts.results.model import Fp8Products, Training
from nvila.components.contracts.sealed import fault
from nvila.components.contracts.step import Outcome
from nvila.components.contracts.steps import PRUNES
from nvila.components.data.skipped import Tally
from nvila.components.model.learning import trained
from nvila.components.train.account import read_skipped
from nvila.components.train.adapters import ADAPTER
from nvila.components.train.data import INDEX
from nvila.components.train.job import FP8, RECORD, TRAINED, Job
from nvila.components.train.launch import launch
from nvila.components.train.losses import LOSSES, SKIPPED, read_losses


class Settings(Section):
    """Slice of a train step."""

    stage: Stage
    run: Run
    seed: int


def keyed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights depend on: a stage goes on after a change of the rest, such as its number of processes."""
    stage, run = settings["stage"], settings["run"]
    free = SHARED_OUT if run["loss_weighting"] == "token" else {"stage": set(), "run": set()}
    unread = KEPT if PRECISIONS[run["precision"]].fp8 else KEPT | {"fp8"}
    return {
        **settings,
        "stage": {name: value for name, value in stage.items() if name not in free["stage"]},
        "run": {name: value for name, value in run.items() if name not in free["run"] | unread},
    }


def run(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> Outcome:
    """Train one stage; an interrupted attempt in `out` is resumed at its last checkpoint.

    Args:
        settings: the row, and how to run it.
        inputs: `model` (the one before this stage), `samples`, and for pruned rows `kept_*` (score tables; the samples
            stand in the place of one of a kind of which nothing is pruned).
        out: gets `model/` (native layout), `adapter/` where parts learn by adapters, `loss.jsonl`, `skipped.jsonl`,
            `loss.png`; and `meter.jsonl`, which is no part of the output.

    Raises:
        TrainingError: a loss that is not finite, a worker that died.
        DataError: more samples cannot be used than `max_skipped_share` allows.
        Preempted: asked to stop.
    """
    from nvila.components.model.checkpoint.native import read_config
    from nvila.components.model.shape import count

    began = time.monotonic()
    _train(settings, inputs, out)
    records, skipped = read_losses(out / LOSSES), read_skipped(out / SKIPPED)
    steps = records[-1]["step"]
    _plot(records, settings.stage.name, out / "loss.png")
    for folder in ("checkpoints", INDEX):
        shutil.rmtree(out / folder, ignore_errors=True)
    seconds, measured = time.monotonic() - began, measures(out / METER)
    samples = steps * settings.stage.batch - len(skipped)
    tally = Tally(f"stage {settings.stage.name}", len(skipped), 1, quiet=True)
    tally.add(skipped)
    tail = [r["loss"] for r in records[-max(1, len(records) // 10) :] if r["loss"] is not None]
    return Outcome(
        kind="model",
        result=Training(
            stage=settings.stage.model_dump(mode="json"),
            methods=dict(settings.stage.learning),
            trained_parameters=trained(count(read_config(out / "model")), settings.stage),
            adapter_bytes=sum(file.stat().st_size for file in (out / ADAPTER).glob("*/*")) or None,
            precision=settings.run.precision,
            fp8=Fp8Products.model_validate_json((out / FP8).read_bytes()) if (out / FP8).is_file() else None,
            steps=steps,
            samples=samples,
            skipped=tally.summary(),
            final_loss=round(sum(tail) / len(tail), 4) if tail else None,
        ),
        files=(*TRAINED, "loss.png"),
        measured={"seconds": seconds} | (measured.model_dump(exclude_none=True) if measured else {}),
    )


def join(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> None:
    """What a further node of a training job does: its share of the processes. The first node does the rest."""
    _train(settings, inputs, out)


def _train(settings: Settings, inputs: Mapping[str, Manifest], out: Path) -> None:
    if fault(out, out / RECORD, TRAINED) is None:
        return
    launch(
        Job(
            stage=settings.stage,
            run=settings.run,
            seed=settings.seed,
            model=str(inputs["model"].dir("model")),
            base=inputs["model"].digest,
            samples=str(inputs["samples"].path("samples.parquet")),
            kept=[str(m.path("scores.parquet")) for _, m in sorted(inputs.items()) if m.step in PRUNES],
            out=str(out),
        )
    )


def _plot(records: list[dict[str, Any]], name: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    losses = [math.nan if r["loss"] is None else r["loss"] for r in records]  # a gap where there is none
    axes.plot([r["step"] for r in records], losses, linewidth=1)
    axes.set(title=f"Stage {name}", xlabel="optimizer step", ylabel="loss per supervised token")
    figure.savefig(path, dpi=100)
