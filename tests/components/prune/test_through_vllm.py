"""A reference that the real vLLM runs scores as the same checkpoint does in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from servable import WITH_VLLM, servable_model

from nvila.components.contracts.results.model import Pruning
from nvila.components.prune import judge, step

pytestmark = [*WITH_VLLM, pytest.mark.turns(3, 2)]


def test_a_reference_may_be_run_by_vllm(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses put to the wrong samples, or those without the picture in the place of the others, would select noise."""
    import pyarrow.parquet as parquet
    import torch

    from nvila.components.contracts.environment import Environment
    from nvila.components.model.checkpoint.serving import write_serving

    monkeypatch.setattr(step, "believed", lambda judged, method: set(judged))
    monkeypatch.setattr(judge, "LEAST_QUESTIONS", 1)
    model, tokenizer = servable_model()
    write_serving(model, tokenizer, tmp_path / "model", dtype=torch.float32)
    one = {"path": str(tmp_path / "model")}
    settings = step.Settings.model_validate(
        {
            "prune": {"small": one, "large": one | {"engine": "vllm"}, "compare": ["multimodal-gain"]},
            "sources": ["colours"],
            "seed": 0,
            "max_skipped_share": 0,
        }
    )
    given = {"samples": small.samples, "model": small.model}
    told = step.run(settings, given, tmp_path / "out", Environment(run=tmp_path / "runs" / "r")).result
    assert isinstance(told, Pruning)
    rows = parquet.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert len(rows) == 24 and all(row["tokens_small"] == row["tokens_large"] for row in rows)
    assert [row["loss_large"] for row in rows] == pytest.approx([row["loss_small"] for row in rows], rel=1e-3)
    assert any(abs(row["loss_blank"] - row["loss_large"]) > 0.1 for row in rows)
    for judged in told.judged.values():
        assert judged.accuracy["large"] == judged.accuracy["small"]
        assert judged.loss["large"] == pytest.approx(judged.loss["small"], rel=1e-3)
        assert set(judged.loss) == {"small", "large", "blank", "question_only"}
