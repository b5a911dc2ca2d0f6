"""Rows that samples share, by the kernel that knows where they begin, beside the same samples in padded rows."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import torch
from gpu_rows.steps import setting

from nvila.components.model.batch import Batch
from nvila.components.model.device import default_device, use_packed_attention
from nvila.components.model.nvila import NVILA, build_model, empty_model
from nvila.components.model.text.conversation import Encoded
from nvila.components.train.loader import Ready
from nvila.components.train.packing import Cost, arrange
from nvila.components.train.windows import Windows

SAMPLES, MEDIAN, SPREAD, LIMIT, SEED = 16, 700, 1.06, 8192, 0
"""Log-normal lengths: the 95th percentile is 4,000 tokens."""
LAYERS, MICRO_BATCH, REPEATS = 4, 4, 5
Row = tuple[str, str, float, float, str, float | None]


def rows() -> Iterator[Row]:
    """Forward and backward pass of texts through blocks of NVILA-8B's decoder."""
    shape, _, _ = setting("nvila-8b", 3, LAYERS, {}, {})
    known = empty_model(shape.config)
    with torch.device(default_device()):
        model = build_model(known.config, known.tokens, torch.bfloat16)
    model.train()
    rng = random.Random(SEED)
    lengths = [min(LIMIT, max(8, round(rng.lognormvariate(0, SPREAD) * MEDIAN))) for _ in range(SAMPLES)]
    ids = [[rng.randrange(1000) for _ in range(length)] for length in lengths]
    ready = Ready([str(n) for n in range(SAMPLES)], [(Encoded(row, list(row)), []) for row in ids], lengths, [])
    work = f"pass of {SAMPLES} texts, log-normal, {sum(lengths):,} tokens, {LAYERS} decoder blocks of 7B widths"
    padded = _seconds(model, ready, "padded", kernel=False)
    yield (
        f"{work}, packed, with a mask",
        "s",
        padded,
        _seconds(model, ready, "packed", kernel=False),
        "padded rows",
        None,
    )
    assert use_packed_attention(model)
    yield (
        f"{work}, packed, varlen kernel",
        "s",
        padded,
        _seconds(model, ready, "packed", kernel=True),
        "padded rows",
        None,
    )


def _seconds(model: NVILA, ready: Ready, packing: str, *, kernel: bool) -> float:
    """Of one round of passes, the fastest."""
    cost = Cost.of(model.config.llm, gpu=True, kernel=kernel)
    windows = Windows(lambda lengths: arrange(lengths, MICRO_BATCH, LIMIT, cost, packing), 0, flat=kernel)
    passes = [batch.to(model.device) for batch in windows.passes([ready])]
    return min(_round(model, passes) for _ in range(REPEATS))


def _round(model: NVILA, passes: list[Batch]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    for batch in passes:
        model(**batch.forward_arguments(), reduction="sum").loss.backward()
    torch.cuda.synchronize()
    model.zero_grad()
    return time.perf_counter() - began
