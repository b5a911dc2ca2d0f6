"""Manifests of the steps before `register`, with a small checkpoint; no step is executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from servable import picture, sample_row
from telling import evaluation, quantization, quantized_evaluation, retained, scored, validation

from nvila.components.contracts.manifest import Kind, Manifest, describe_files
from nvila.components.contracts.results.accuracy import Passed
from nvila.components.contracts.results.result import Result


def manifest(root: Path, step: str, kind: Kind, result: Result, files: dict[str, str] | None = None) -> Manifest:
    folder = root / "store" / step / "k"
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    folder.mkdir(parents=True, exist_ok=True)
    made = Manifest(step=step, key="k" * 64, kind=kind, result=result, files=describe_files(folder), folder=str(folder))
    made.save(folder / "manifest.json")
    return made


def questions(root: Path, count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the sample table and of predictions, each of a picture of its own."""
    samples, predictions = [], []
    for i in range(count):
        picture(root / f"{i}.png", i)
        row = sample_row("digits", i, root, f"{i}.png", split="heldout")
        samples.append(row)
        same = {name: row[name] for name in ("id", "source", "answer")}
        predictions.append(same | {"prediction": "7", "correct": row["answer"] == "7"})
    return samples, predictions


def table(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)


@pytest.fixture
def register_inputs(tmp_path: Path) -> dict[str, Manifest]:
    samples, predictions = questions(tmp_path, 3)
    table(tmp_path / "store" / "validate" / "k", "samples.parquet", samples)
    table(tmp_path / "store" / "evaluate-quantized" / "k", "predictions.parquet", predictions)
    full, small = {"digits": scored(0.71, 0.03, majority=0.11)}, {"digits": retained(0.71)}
    weights = {"model/config.json": "{}", "model/model.safetensors": "weights"}
    counts = validation({"digits": {"sft": 4000, "heldout": 1000}}, {"undecodable": 2})
    return {
        "model": manifest(tmp_path, "quantize", "model", quantization(), weights),
        "metrics": manifest(tmp_path, "evaluate-quantized", "metrics", quantized_evaluation(small)),
        "full": manifest(tmp_path, "evaluate", "metrics", evaluation(full)),
        "samples": manifest(tmp_path, "validate", "dataset", counts),
        "gate": manifest(tmp_path, "gate-quantized", "metrics", Passed(sources=["digits"])),
    }
