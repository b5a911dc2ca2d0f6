"""Recipe section `train`: the table of the five stages; paper table 8, spec section 3.1."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nvila.components.contracts.recipe.section import Section

Part = Literal["vision_tower", "mm_projector", "llm"]
Precision = Literal["fp32", "bf16", "fp8-delayed", "fp8-current", "fp8-block"]


class Stage(Section):
    """One row of the stage table."""

    name: str
    trainable: list[Part] = Field(min_length=1)
    """Parts that learn; the others are frozen."""
    learning_rate: float
    """Peak of the cosine schedule."""
    data: dict[str, float] = Field(min_length=1)
    """`source.split` -> passes over it; 0.5 is half of it, 2 is twice."""
    pruned: bool = False
    """Take only what DeltaLoss kept of the SFT splits."""
    batch: int
    """Global batch, in samples."""
    micro_batch: int | None = None
    """Samples per forward pass and GPU; None is the global batch over the number of GPUs."""
    max_length_tokens: int = 8192
    clip_norm: float | None = None
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    gradient_checkpointing: bool = False


class TrainSettings(Section):
    """The five stages and how they are run."""

    stages: list[Stage] = Field(min_length=5, max_length=5)
    precision: Precision = "bf16"
    zero: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    gpus: int = 1
    """Processes under torchrun (one per GPU; on a machine without one, CPU processes)."""
    checkpoint_seconds: float = 60.0
    """Longest time between two checkpoints of an unfinished stage."""
