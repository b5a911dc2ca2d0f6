"""Training in this very process: one rank, its own process group, no torchrun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.train.job import Job

IMAGE_STAGE: dict[str, Any] = {
    "name": "image instruction tuning",
    "trainable": ["vision_tower", "mm_projector", "llm"],
    "learning_rate": 2e-3,
    "data": {"colours.sft": 2},
    "batch": 8,
}
"""Six optimizer steps over the 24 image questions."""


@pytest.fixture
def image_stage() -> dict[str, Any]:
    """A row of the stage table."""
    return dict(IMAGE_STAGE)


@pytest.fixture
def make_job(small: Any, tmp_path: Path) -> Callable[..., Job]:
    """`make_job("name", stage={...}, run={...})`: a job in a folder of its own."""

    def make(name: str, *, stage: dict[str, Any] | None = None, run: dict[str, Any] | None = None, **job: Any) -> Job:
        settings = {"precision": "fp32", "zero": 0, "gpus": 1, "checkpoint_seconds": 3600.0} | (run or {})
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        given = {"model": str(small.model.dir("model")), "samples": str(small.samples.path("samples.parquet"))}
        return Job(
            stage=Stage.model_validate(IMAGE_STAGE | (stage or {})),
            run=Run.model_validate(settings),
            seed=0,
            out=str(out),
            **(given | job),
        )

    return make
