"""Memory of fine-tuning the whole NVILA-8B on a card of 24 GB: layer norms of the tower, QLoRA of the decoder."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_rows.steps import setting, steps

CARD_BYTES = 24e9
LAYERS = 28
STAGE = {"methods": {"vision_tower": "layernorm", "llm": "qlora"}, "gradient_checkpointing": True}
Row = tuple[str, str, float, float, str, float | None]


def rows() -> Iterator[Row]:
    """The most that its tensors hold in a step of one sample of 8,192 positions."""
    shape, stage, run = setting("nvila-8b", 3, LAYERS, STAGE, {})
    taken = steps(shape, stage, run, 1, video=False)
    work = f"fine-tuning NVILA-8B, LayerNorm and QLoRA, {taken.positions:,} positions a step"
    yield work, "GB", CARD_BYTES / 1e9, taken.bytes / 1e9, "a card of 24 GB", 1.0
