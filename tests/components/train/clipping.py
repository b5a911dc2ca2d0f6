"""How far weights move with the shortest gradients that `clip_norm` allows, and unclipped, at every ZeRO stage.

By hand: `python tests/components/train/clipping.py`. test_optimizer.py takes one case.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.train import Run, Stage

STAGE: dict[str, Any] = {"name": "x", "trainable": ["llm"], "learning_rate": 1e-2, "data": {"a.sft": 1}, "batch": 1}


def moved(precision: str, zero: int, clip_norm: float | None) -> float:
    """Distance that a decoder moves in two steps with the same gradients of 1; in this process, a group of its own."""
    import torch

    from nvila.components.train.engine import start

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llm = torch.nn.Linear(64, 64)

        def forward(self, reduction: str) -> Any:
            return SimpleNamespace(loss=self.llm(torch.ones(1, 64, dtype=dtype)).float().sum(), supervised=1)

    dtype = getattr(torch, PRECISIONS[precision].weights)  # type: ignore[index]
    torch.manual_seed(0)
    model = Decoder().to(dtype)
    before = [p.detach().float().clone() for p in model.parameters()]
    stage = Stage.model_validate(STAGE | {"clip_norm": clip_norm, "warmup_ratio": 0.0})
    engine = start(model, stage, Run.model_validate({"precision": precision, "zero": zero}), 4, 1)
    for _ in range(2):
        engine.accumulate()
        assert engine.step(1)
    after = [engine.weights()[name].float() for name, _ in model.named_parameters()]
    return math.dist(*(torch.cat([t.flatten() for t in some]).tolist() for some in (before, after)))


def main() -> None:
    """The table."""
    import os

    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "DS_LOG_LEVEL": "warning"}
    for precision in ("fp32", "bf16"):
        for zero in range(4):
            found = [f"clip_norm {clip}: {moved(precision, zero, clip):.4f}" for clip in (None, 1e-6)]
            print(f"{precision} zero {zero}:", *found)


if __name__ == "__main__":
    main()
