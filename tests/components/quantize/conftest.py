"""One quantized tiny checkpoint for all tests: llm-compressor takes seconds to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from servable import clip, manifest, picture, sample_row, servable_model

from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.step import Outcome
from nvila.components.data.samples import write_samples
from nvila.components.model.checkpoint.native import save_native
from nvila.components.quantize.step import Settings, run


@dataclass(frozen=True)
class Quantized:
    """What the step was given and made."""

    inputs: Mapping[str, Manifest]
    out: Path
    outcome: Outcome


def settings(**changes: Any) -> Settings:
    """The step's slice for the tiny model."""
    return Settings.model_validate(
        {"quantize": {"group_size": 32, "calibration_samples": 6, **changes}, "seed": 0, "max_skipped_share": 0.01}
    )


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("quantize")
    model, tokenizer = servable_model()
    save_native(model, tokenizer, root / "train" / "model")
    data = root / "data"
    data.mkdir()
    rows = [sample_row("grids", i, data, picture(data / f"{i}.png", i).name) for i in range(8)]
    rows += [sample_row("clips", i, data, clip(data / f"{i}.mp4", i).name, "video") for i in range(2)]
    rows.append(sample_row("grids", 99, data, "not-there.png", split="heldout"))
    (root / "table").mkdir()
    write_samples(root / "table" / "samples.parquet", rows)
    return {"model": manifest("train-5", root / "train"), "samples": manifest("validate", root / "table")}


@pytest.fixture(scope="session")
def quantized(inputs: dict[str, Manifest], tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    out = tmp_path_factory.mktemp("quantized")
    return Quantized(inputs, out, run(settings(method="gptq"), inputs, out))
