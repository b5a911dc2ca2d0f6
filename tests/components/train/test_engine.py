"""What the processes of a training job must agree on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from nvila.components.contracts.recipe.train import Run
from nvila.components.contracts.sealed import seal
from nvila.components.train.checkpoints import RECORD
from nvila.components.train.engine import Engine
from nvila.components.train.keeper import Keeper


class Loaded(SimpleNamespace):
    """In DeepSpeed's place: remembers which checkpoint it was to load."""

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, int]]:
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
