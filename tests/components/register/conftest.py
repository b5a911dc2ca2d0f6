"""Manifests of the steps before `register`, with a small checkpoint; no step is executed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nvila.components.contracts.manifest import Kind, Manifest, describe_files


def manifest(root: Path, step: str, kind: Kind, values: dict, files: dict[str, str] | None = None) -> Manifest:
    folder = root / "store" / step / "k"
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    folder.mkdir(parents=True, exist_ok=True)
    made = Manifest(step=step, key="k" * 64, kind=kind, values=values, files=describe_files(folder), folder=str(folder))
    made.save(folder / "manifest.json")
    return made


@pytest.fixture
def register_inputs(tmp_path: Path) -> dict[str, Manifest]:
    measured = {"accuracy": 0.71, "low": 0.68, "high": 0.74, "n": 1000}
    only = {"kind": "blank picture", "accuracy": 0.3, "low": 0.27, "high": 0.33}
    full = {"digits": measured | {"majority": 0.11, "question_only": only}}
    weights = {"model/config.json": "{}", "model/model.safetensors": "weights"}
    schemes = {"bytes_before": 400, "bytes_after": 170, "linears": {"W4A16": 21}}
    counts = {"records": {"digits": {"sft": 4000, "heldout": 1000}}, "quarantined": {"undecodable": 2}}
    return {
        "model": manifest(tmp_path, "quantize", "model", schemes, weights),
        "metrics": manifest(tmp_path, "evaluate-quantized", "metrics", {"accuracy": {"digits": measured}}),
        "full": manifest(tmp_path, "evaluate", "metrics", {"accuracy": full}),
        "samples": manifest(tmp_path, "validate", "dataset", counts),
        "gate": manifest(tmp_path, "gate-quantized", "metrics", {"passed": True}),
    }
