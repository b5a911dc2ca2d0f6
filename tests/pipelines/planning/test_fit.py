"""The largest micro batch of each stage: computed, and measured by the stage's own engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_measured import CONFIG, TOKENS
from typer.testing import CliRunner

from nvila.components.contracts.gpus import GPUS
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.train import Run, Stage
from nvila.components.model.shape import count
from nvila.components.train.engine import Engine
from nvila.pipelines.cli import app
from nvila.pipelines.planning import fit
from nvila.pipelines.planning.measured import largest_batch, peak_bytes
from nvila.pipelines.planning.memory import RESERVE_BYTES, need
from nvila.pipelines.planning.shape import shape_of


def test_the_largest_that_fits_is_computed() -> None:
    """One that is too large ends in the first step, after a night in a queue; a smaller one wastes the GPU."""
    recipe = fill_in(Form(recipe="nvila-lite-2b"))
    shape = shape_of(recipe.model)
    assert shape
    for gpu in (GPUS["h100"], GPUS["b200"]):
        for found, stage in zip(fit.fits(recipe, shape, gpu), recipe.train.stages, strict=True):
            assert stage and found.how.startswith(f"computed for {gpu.name}: ")
            possible = fit.sizes(stage, recipe.train.gpus)
            fitting = [
                size
                for size in possible
                if need(recipe, stage.model_copy(update={"micro_batch": size}), shape).peak + RESERVE_BYTES
                <= gpu.memory_bytes
            ]
            assert found.most == max(fitting, default=None) and found.now == stage.micro_batch
            assert all(stage.batch % (size * recipe.train.gpus) == 0 for size in possible)
    tiny = replace(GPUS["h100"], memory_bytes=RESERVE_BYTES)
    assert {found.most for found in fit.fits(recipe, shape, tiny)} == {None}


def test_plan_tells_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number without where it comes from is taken for a measured one."""
    monkeypatch.chdir(tmp_path)
    asked = ["plan", "micro", "--no-cluster", "--fit"]
    told = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert [row["step"] for row in told["fits_at_most"]] == [f"train-{number}" for number in range(1, 6)]
    assert all(row["most"] >= row["now"] > 0 and "no GPU here" in row["how"] for row in told["fits_at_most"])
    assert "computed for h100: there is no GPU here" in CliRunner().invoke(app, asked).stdout


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("video", [False, True])
def test_steps_are_taken_until_the_memory_is_full(monkeypatch: pytest.MonkeyPatch, video: bool) -> None:
    """What measures has to be what trains, on rows as long as the limit, and end where a GPU is full, not with it."""
    from nvila.components.train import engine

    monkeypatch.setattr(engine, "leave", lambda: None)  # the group is the other test's too
    rows: list[int] = []
    accumulate = Engine.accumulate

    def limited(self: Engine, **batch: Any) -> tuple[torch.Tensor, int]:
        rows.append(len(batch["input_ids"]))
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loss, supervised = accumulate(self, **batch)
        assert loss.isfinite() and 0 < supervised < 96 * rows[-1]
        return loss, supervised

    monkeypatch.setattr(Engine, "accumulate", limited)
    sampling = replace(CONFIG.sampling, frames=2)
    shape = count(replace(CONFIG, sampling=sampling, max_length_tokens=160))
    parts = ["mm_projector", "llm"]
    stage = Stage(name="x", trainable=parts, learning_rate=1e-3, data={"a.sft": 1}, batch=8)
    found = peak_bytes(shape, stage, Run(precision="fp32", gpus=1), video, fit.sizes(stage, 1))
    assert list(found) == [1, 2] and rows == [1, 1, 2, 2, 4]


def test_rows_are_as_large_as_they_can_be() -> None:
    """A batch smaller than the largest real one promises what the first long sample breaks."""
    from nvila.components.model.nvila import build_model
    from nvila.components.train.meter import counted

    model = build_model(replace(CONFIG, vision_mode="dynamic", max_tiles=4), TOKENS)
    shape = count(model.config)
    made = largest_batch(model, 2, False)
    seen = counted(_Batch(**made), model.config, model.tokens)
    assert seen.tiles == 2 * shape.image.tiles and seen.places == 2 * model.config.max_length_tokens

    long = replace(model.config, max_length_tokens=2 * shape.image.tokens + 10)
    model.config = long
    packed = largest_batch(model, 2, False, packed=True)
    assert len(packed["visuals"]) == 4 * len(made["visuals"]) // 2 and set(packed["rows"].tolist()) == {0}
    assert model(**packed).loss.isfinite()


class _Batch:
    samples = ("a", "b")
    lengths = ()
    computed = 0

    def __init__(self, **arguments: Any) -> None:
        self.__dict__.update(arguments)
