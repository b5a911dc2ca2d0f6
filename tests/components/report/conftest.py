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
    judged,
    pruned,
    quantization,
    quantized_evaluation,
    retained,
    scored,
    training,
    validation,
)

from nvila.components.contracts.manifest import File, InputRef, Manifest, describe_files
from nvila.components.contracts.results.model import Composition, PrunedGroup, PrunedSource, Pruning
from nvila.components.contracts.results.result import Result
from nvila.components.contracts.results.run import Registration, Resolution, Rollout
from nvila.components.data.samples import write_samples

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
        _samples(root, folder, text)
        return validation({n: {"sft": 4000, "heldout": 1000} for n in NAMES}, {text: 3})
    if step.startswith("prune"):
        return _pruning(folder, ("clips",) if step.endswith("video") else ("shapes", "digits"), dice, text)
    if step.startswith("train"):
        rows = [{"step": i, "loss": 2 * math.exp(-i / 90) + 0.4 + dice.gauss(0, 0.07), "lr": 1e-3} for i in range(400)]
        rows[100]["loss"] = None
        (folder / "loss.jsonl").write_text("\n".join(map(json.dumps, rows)))
        if step == "train-4":
            attempt = {
                "began": 1.0,
                "startup_seconds": 18.0,
                "processes": 2,
                "device": "NVIDIA H100",
                "peak_flops": 1e12,
            }
            reading = {"time": 3.0, "step": 400, "seconds": 2.0, "loss": 0.4, "lr": 0.1, "samples": 10, "tokens": 90}
            reading |= {"places": 120, "operations": 1e12, "waited_seconds": 0.2, "rss_bytes": 2**30}
            (folder / "meter.jsonl").write_text(f"{json.dumps(attempt)}\n{json.dumps(reading)}\n")
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


def _samples(root: Path, folder: Path, text: str) -> None:
    """Twelve samples of each source, the clips as folders of frames; the picture of the last of each is gone."""
    from PIL import Image

    media, rows = root / "media", list[dict[str, Any]]()
    for number, source in enumerate(NAMES):
        for i in range(12):
            name = f"{source}/{i}" if source == "clips" else f"{source}-sft-{i}.png"
            frames = [f"{name}/{frame}.png" for frame in range(8)] if source == "clips" else [name]
            for frame, path in enumerate(frames) if i < 11 else ():
                (media / path).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (56, 56), (60 * number + 50, 20 * i, 30 * frame)).save(media / path)
            rows.append(
                {
                    "id": f"{source}-{i}",
                    "source": source,
                    "kind": "video" if source == "clips" else "image",
                    "split": "sft",
                    "root": str(media),
                    "media": [name],
                    "media_sha256": [None],
                    "conversations": "[]",
                    "question": f"What is it? {text}",
                    "answer": f"yes {text}",
                    "line": i,
                }
            )
    write_samples(folder / "samples.parquet", rows)


def _pruning(folder: Path, sources: tuple[str, ...], dice: random.Random, text: str) -> Pruning:
    """DeltaLoss, whose references know colours and have learnt nothing of yes and no."""
    import pyarrow
    import pyarrow.parquet as parquet

    rows, kinds, groups = list[dict[str, Any]](), {}, {}
    for source in sources:
        colour, other = f"{source}: colour", f"{source}: yes/no {text}"
        kinds |= {
            colour: judged(),
            other: judged(
                loss={"small": 0.46, "large": 0.45, "blank": 0.47, "question_only": 0.44},
                accuracy={"small": 0.5, "large": 0.51},
                against={"small": -0.03, "blank": -0.01, "question_only": -0.08},
                trusted=False,
                why=f"the large reference is not better than the small one: {text}",
            ),
        }
        groups |= {
            colour: PrunedGroup(source=source, n=400, kept=200, ranked_by="deltaloss", kinds=[colour], mean_score=0.3),
            other: PrunedGroup(source=source, n=400, kept=400, ranked_by="none", kinds=[other]),
        }
        deltas = sorted((dice.gauss(0.3, 0.8) for _ in range(400)), reverse=True)
        for i in range(800):
            score = deltas[i] if i < 400 else None
            told = {"id": f"{source}-{i}", "source": source, "kind": colour if i < 400 else other, "score": score}
            losses = {"loss_small": 2.0 + (score or 0), "loss_large": 2.0, "loss_blank": None}
            rows.append(told | losses | {"kept": i < 200 or i >= 400})
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "scores.parquet")
    return Pruning(
        method="deltaloss",
        score="sum",
        sources={source: _pruned_source(source, text) for source in sources},
        groups=groups,
        judged=kinds,
        shifted=[f"the answers of {source} moved by 13.1%: {text}" for source in sources[:1]],
    )


def _pruned_source(source: str, text: str) -> PrunedSource:
    words = [*(f"answer {i}" for i in range(12)), text]
    before, after = dict.fromkeys(words, 1 / 13), {w: (i + 1) / 91 for i, w in enumerate(words)}
    ids = [f"{source}-{i}" for i in range(12)]
    return pruned(
        n=800,
        kept=600,
        composition={
            "answers": Composition(before=before, after=after, shift=0.231),
            "answer lengths": Composition(before={"1": 0.7, "2-3": 0.3}, after={"2-3": 0.4, "1": 0.6}, shift=0.1),
            "resolutions": Composition(before={"56x56": 1.0}, after={"56x56": 1.0}, shift=0.0),
        },
        categories={"too easy": 300, "both fail": 200, "distracting": 100, "informative": 200},
        examples={
            "informative": ids[:3],
            "too easy": ids[3:6],
            "both fail": ids[6:9],
            "distracting": [*ids[9:], "lost"],
        },
    )


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
