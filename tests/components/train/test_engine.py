"""What the processes of a training job must agree on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nvila.components.contracts.recipe.train import Run
from nvila.components.contracts.sealed import seal
from nvila.components.train.checkpoints import RECORD
from nvila.components.train.engine import Engine
from nvila.components.train.keeper import Keeper


class Loaded(SimpleNamespace):
    """In DeepSpeed's place: remembers which checkpoint it was to load."""

    def load_checkpoint(self, folder: str, tag: str, **_: Any) -> tuple[str, dict[str, int]]:
        return f"{folder}/{tag}", {"step": int(tag.removeprefix("step-"))}


def _resume(rank: int, folders: list[str], meeting: str, out: str) -> None:
    import torch.distributed

    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    engine = Engine(Loaded(global_rank=rank, world_size=2, device="cpu"))
    Path(out, str(rank)).write_text(str(Keeper(engine, Path(folders[rank]), [], Run()).resume()))
    torch.distributed.destroy_process_group()


def test_processes_resume_where_the_first_says(tmp_path: Path) -> None:
    """On a shared file system one machine may not see yet what another has written; each would go its own way."""
    import torch.multiprocessing

    views = [tmp_path / "first", tmp_path / "second"]
    for view in views:
        view.mkdir()
    checkpoint = views[0] / "step-7"
    checkpoint.mkdir()
    (checkpoint / "states.pt").write_bytes(b"0")
    seal(checkpoint, checkpoint / RECORD, ["*.pt"])
    torch.multiprocessing.start_processes(
        _resume, ([str(v) for v in views], str(tmp_path / "meeting"), str(tmp_path)), nprocs=2, start_method="fork"
    )
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["7", "7"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_one_weight_that_is_not_finite_is_found_wherever_it_lies(value: str, dtype: str) -> None:
    """A comparison with NaN is false: who looks for the largest weight may pass over it and keep it."""
    import torch

    model = torch.nn.Module()
    for name, count in {"none": 0, "one": 1, "few": 37, "many": 5000, "rows": 4096}.items():
        model.register_parameter(name, torch.nn.Parameter(torch.randn(count).to(getattr(torch, dtype))))
    model.rows.data = model.rows.data.view(64, 64).t()
    engine = Engine(SimpleNamespace(module=model, world_size=1))
    with torch.no_grad():
        model.many[7] = torch.finfo(model.many.dtype).max
        assert engine.not_finite() == []
        for name in ("one", "few", "many", "rows"):
            weight = getattr(model, name)
            for at in {0, weight.numel() // 2, weight.numel() - 1}:
                place = (at // 64, at % 64) if name == "rows" else at
                before = weight[place].clone()
                weight[place] = float(value)
                assert engine.not_finite() == [name], at
                weight[place] = before
