"""How a part of the model learns in a stage: all of it, its layer norms alone, or adapters beside frozen weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nvila.components.contracts.recipe.section import Section

Part = Literal["vision_tower", "mm_projector", "llm"]
Method = Literal["full", "layernorm", "lora", "dora", "qlora"]

METHODS: dict[Part, tuple[Method, ...]] = {
    "vision_tower": ("full", "layernorm", "lora"),
    "mm_projector": ("full",),
    "llm": ("full", "lora", "dora", "qlora"),
}
"""By which methods each part can learn: the paper's table 6, with DoRA, which the reference has besides."""
ADAPTERS = frozenset[Method](("lora", "dora", "qlora"))
"""Methods that train adapters. `qlora` is LoRA on weights of four bits (NF4, its scales quantized once more)."""


class Lora(Section):
    """The adapters of a stage, on every Linear of a part's blocks; by default the reference's values."""

    rank: int = Field(default=64, ge=1, le=1024)
    """Of the product of two matrices that is added to a weight."""
    alpha: int = Field(default=16, ge=1, le=65_536)
    """The product counts alpha / rank times."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of an adapter's inputs that a training pass leaves out."""
