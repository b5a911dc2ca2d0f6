"""A run as the steps leave it behind: status files, manifests, tables, pictures. No step is executed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from telling import (
    evaluation,
    pruned,
    quantization,
    quantized_evaluation,
    retained,
    scored,
    training,
    validation,
)

from nvila.components.contracts.manifest import File, InputRef, Manifest, describe_files
from nvila.components.contracts.results.model import PrunedSource, Pruning
from nvila.components.contracts.results.result import Result
from nvila.components.contracts.results.run import Registration, Resolution, Rollout

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
NAMES = ("shapes", "digits", "clips")
MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Builds the run in a temporary folder."""
    return lambda **options: build(tmp_path, **options)


def build(root: Path, *, stop_at: str | None = None, verdict: str = "rejected", text: str = "plain") -> Path:
    """A run folder; the step `stop_at` ends with `verdict` and nothing after it ran.

    Args:
        text: put into every field that comes from a user's record.
    """
    run = root / "runs" / "2026-11-22-a"
    clock = 1_000_000.0
    made: dict[str, Manifest] = {}
    for step, seconds, kind, needs in STEPS:
        status: dict[str, Any] = {"name": step, "status": "done", "started": clock, "pid": 1}
        clock += seconds
        status |= {"ended": clock, "seconds": seconds, "cached": False, "exit_code": 0, "message": None}
        if step == stop_at:
            status |= {"status": verdict, "exit_code": 3, "manifest": None, "message": f"the gate says no: {text}"}
        else:
            made[step] = _manifest(root, step, kind, {name: made[name] for name in needs}, text)
            status["manifest"] = f"{made[step].folder}/manifest.json"
        (run / "steps").mkdir(parents=True, exist_ok=True)
        (run / "steps" / f"{step}.json").write_text(json.dumps(status))
        if step == stop_at:
            break
    return run


STEPS: tuple[tuple[str, float, str, tuple[str, ...]], ...] = (
    ("resolve", 0.4, "slices", ()),
    ("preflight", 2.1, "metrics", ("resolve",)),
    ("validate", 31, "dataset", ()),
    ("initialize", 140, "model", ("validate",)),
    ("prune-image", 95, "dataset", ("validate",)),
    ("prune-video", 48, "dataset", ("validate",)),
    ("train-1", 22, "model", ("initialize", "validate")),
    ("train-2", 61, "model", ("train-1", "validate")),
    ("train-3", 88, "model", ("train-2", "validate")),
    ("train-4", 185, "model", ("train-3", "prune-image")),
    ("train-5", 92, "model", ("train-4", "prune-video")),
    ("evaluate", 120, "metrics", ("train-5", "validate")),
    ("gate", 0.3, "metrics", ("evaluate",)),
    ("quantize", 64, "model", ("train-5", "validate")),
    ("evaluate-quantized", 133, "metrics", ("quantize", "validate")),
    ("gate-quantized", 0.3, "metrics", ("evaluate-quantized",)),
    ("register", 5, "version", ("quantize", "evaluate-quantized")),
    ("rollout", 52, "endpoint", ("register",)),
)


def _manifest(root: Path, step: str, kind: Any, inputs: dict[str, Manifest], text: str) -> Manifest:
    folder = root / "store" / step / "0123456789"
    folder.mkdir(parents=True, exist_ok=True)
    result = _result(root, folder, step, text)
    refs = {n: InputRef(step=m.step, uri=f"{m.folder}/manifest.json", digest=m.digest) for n, m in inputs.items()}
    sources = [File(uri=f"/data/{name}/sft.json", size_bytes=12345, sha256="ab" * 32) for name in NAMES]
    manifest = Manifest(
        step=step,
        key="k" * 64,
        kind=kind,
        inputs=refs,
        files=describe_files(folder),
        result=result,
        folder=str(folder),
        sources=sources if step == "validate" else [],
    )
    manifest.save(folder / "manifest.json")
    return manifest


def _result(root: Path, folder: Path, step: str, text: str) -> Result | None:
    dice = random.Random(step)
    if step == "resolve":
        slices = {
            "validate": {"data": {"sources": [{"name": "shapes", "path": text}]}},
            "train-1": {"api_key": "hunter2"},
        }
        return Resolution(recipe={"name": "tiny"}, slices=slices)
    if step == "validate":
        spoilt = [{"source": n, "id": f"{n}-{i}", "line": i, "reason": text} for i, n in enumerate(NAMES)]
        (folder / "quarantine.jsonl").write_text("\n".join(map(json.dumps, spoilt)))
        return validation({n: {"sft": 4000, "heldout": 1000} for n in NAMES}, {text: 3})
    if step.startswith("prune"):
        sources = ("clips",) if step.endswith("video") else ("shapes", "digits")
        return Pruning(sources=_scores(folder, sources, dice))
    if step.startswith("train"):
        rows = [{"step": i, "loss": 2 * math.exp(-i / 90) + 0.4 + dice.gauss(0, 0.07), "lr": 1e-3} for i in range(400)]
        (folder / "loss.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return training(stage={"name": text})
    if step.startswith("evaluate"):
        return _evaluation(root, folder, step, text)
    told: dict[str, Result] = {
        "quantize": quantization(
            bytes_before=4_200_000, bytes_after=1_700_000, linears={"W8A8": 18, "W4A16": 21, text: 1}
        ),
        "register": Registration(name="nvila-tiny", version="3", model_uri="models:/nvila-tiny/3"),
        "rollout": Rollout(
            endpoint="http://127.0.0.1:8321",
            decision="promote",
            model="nvila-tiny",
            version="3",
            pinned={"asked": 12, "agreed": 12},
        ),
    }
    return told.get(step)


def _scores(folder: Path, sources: tuple[str, ...], dice: random.Random) -> dict[str, PrunedSource]:
    import pyarrow
    import pyarrow.parquet as parquet

    rows = []
    for source in sources:
        deltas = sorted((dice.gauss(0.3, 0.8) for _ in range(800)), reverse=True)
        rows += [{"id": f"{source}-{i}", "source": source, "delta": d, "kept": i < 400} for i, d in enumerate(deltas)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "scores.parquet")
    return {source: pruned(informative=source != "digits") for source in sources}


def _evaluation(root: Path, folder: Path, step: str, text: str) -> Result:
    import pyarrow
    import pyarrow.parquet as parquet
    from PIL import Image

    media = root / "media"
    media.mkdir(exist_ok=True)
    rows = []
    for number, source in enumerate(NAMES):
        for i in range(30):
            picture = media / f"{source}-{i}.png"
            Image.new("RGB", (56, 56), (60 * number + 50, 7 * i, 200 - 5 * i)).save(picture)
            right = i % 3 != 0
            rows.append(
                {
                    "id": f"{source}/heldout/{i}",
                    "source": source,
                    "question": f"Which digit is in row 2, column 1? {text}",
                    "answer": "7",
                    "prediction": "7" if right else text,
                    "correct": right,
                    "root": str(media),
                    "media": [picture.name] if i != 1 else ["gone.png"],
                }
            )
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "predictions.parquet")
    scores = {"shapes": 0.81, "digits": 0.72, "clips": 0.64}
    if step == "evaluate-quantized":
        return quantized_evaluation({n: retained(a - 0.01, full=a) for n, a in scores.items()})
    names = ("initialize", "train-1", "train-2", "train-3", "train-4", "train-5")
    stages = {s: {n: round(a * min(1, (i + 1) / 5), 3) for n, a in scores.items()} for i, s in enumerate(names)}
    return evaluation({n: scored(a, majority=0.11) for n, a in scores.items()}, stages)
