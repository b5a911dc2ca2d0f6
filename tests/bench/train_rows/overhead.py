"""What DeepSpeed costs beside a bare PyTorch loop that does the same: one process, CPU seconds of an optimizer step.

A decoder of 100 million parameters (Qwen2's blocks: 12 of width 768, MLP 2048, 20,000 tokens tied), one row of 512
tokens, AdamW with gradients clipped. In bfloat16 both keep fp32 masters. By hand, with the time of each part:

    .venv/bin/python tests/bench/train_rows/overhead.py
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nvila.components.model.device import use_float32_products

if TYPE_CHECKING:
    from nvila.components.contracts.recipe.train import Run, Stage
    from nvila.components.train.engine import Engine

STEPS = 4
TOKENS = 512
SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 20_000,
    "tie_word_embeddings": True,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AT_LEAST = 1 / 1.1
RATE, CLIP = 1e-5, 1.0
Row = tuple[str, str, float, float, str, float | None]


def rows() -> Iterator[Row]:
    """ZeRO 0 and 1, in both precisions."""
    alone()
    for precision in ("fp32", "bf16"):
        for zero in (0, 1):
            bare, ours = _compared(zero, precision)
            work = f"step of 100M parameters over {TOKENS} tokens, DeepSpeed ZeRO {zero}, {precision}"
            what = "bare PyTorch: AdamW, clipping" + (", fp32 masters" if precision == "bf16" else "")
            yield work, "CPU s", min(map(sum, bare)), min(map(sum, ours)), what, AT_LEAST if zero == 1 else None


def alone() -> None:
    """Make this process the only one of its job, with one thread."""
    torch.set_num_threads(1)
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def row(step: int) -> torch.Tensor:
    """Token ids of a step, in one row."""
    return torch.randint(0, SIZES["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(step))


def settings(zero: int, precision: str) -> tuple[Stage, Run]:
    """Of one row a step."""
    from nvila.components.contracts.recipe.train import Run, Stage

    stage = {"name": "bench", "trainable": ["llm"], "data": {"a.sft": 1}, "batch": 1, "clip_norm": CLIP}
    stage |= {"learning_rate": RATE, "warmup_ratio": 0.0}
    return Stage.model_validate(stage), Run.model_validate({"precision": precision, "zero": zero})


def started(zero: int, precision: str) -> Engine:
    """The decoder under our engine."""
    from nvila.components.train.engine import start

    return start(_Decoder(DTYPES[precision]).train(), *settings(zero, precision), 1000, 1)


class _Decoder(nn.Module):
    """Of the interface that the engine wants."""

    def __init__(self, dtype: torch.dtype) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        super().__init__()
        torch.manual_seed(0)
        self.llm = Qwen2ForCausalLM._from_config(Qwen2Config(**SIZES), dtype=dtype, attn_implementation="eager")
        use_float32_products(self)

    def forward(self, ids: torch.Tensor, reduction: str = "sum") -> Any:
        hidden = self.llm.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logits = self.llm.lm_head(hidden).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)
        return SimpleNamespace(loss=loss, supervised=ids.numel() - len(ids))


Parts = tuple[float, float]
"""CPU seconds of the passes, and of the optimizer's step."""


def _compared(zero: int, precision: str) -> tuple[list[Parts], list[Parts]]:
    """The bare loop and ours in turns, on the same rows."""
    taken: tuple[list[Parts], list[Parts]] = ([], [])
    ways = (_bare(DTYPES[precision]), _ours(started(zero, precision)))
    for step in range(STEPS + 1):
        for way, found in zip(ways, taken, strict=True):
            parts = way(row(step))
            if step:
                found.append(parts)
    return taken


def _bare(dtype: torch.dtype) -> Callable[[torch.Tensor], Parts]:
    model = _Decoder(dtype).train()
    weights = list(model.parameters())
    masters = weights if dtype == torch.float32 else [p.detach().float().requires_grad_() for p in weights]
    adam = torch.optim.AdamW(masters, lr=RATE)

    def step(ids: torch.Tensor) -> Parts:
        began = time.process_time()
        output = model(ids)
        (output.loss / output.supervised).backward()
        passed = time.process_time()
        if masters is not weights:
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        adam.step()
        adam.zero_grad()
        if masters is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        return passed - began, time.process_time() - passed

    return step


def _ours(engine: Engine) -> Callable[[torch.Tensor], Parts]:
    def step(ids: torch.Tensor) -> Parts:
        began = time.process_time()
        _, weight = engine.accumulate(ids=ids)
        passed = time.process_time()
        engine.step(weight)
        return passed - began, time.process_time() - passed

    return step


if __name__ == "__main__":
    alone()
    for precision in ("fp32", "bf16"):
        for zero in (0, 1):
            for name, parts in zip(("bare", "ours"), _compared(zero, precision), strict=True):
                passes, step = min(parts, key=sum)
                print(f"{precision} ZeRO {zero} {name}: {passes + step:.2f} s (passes {passes:.2f}, step {step:.2f})")
