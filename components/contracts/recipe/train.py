"""Recipe section `train`: the table of the stages; paper section 3.1 and table 8."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from nvila.components.contracts.precisions import Precision
from nvila.components.contracts.recipe.section import Section

Part = Literal["vision_tower", "mm_projector", "llm"]


class Stage(Section):
    """One row of the stage table."""

    name: str
    trainable: list[Part] = Field(min_length=1)
    """Parts that learn; the others are frozen."""
    learning_rate: float = Field(gt=0)
    """Peak of the cosine schedule."""
    data: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """`source.split` -> passes over it; 0.5 is half of it, 2 is twice."""
    pruned: bool = False
    """Take only what pruning kept of the SFT splits."""
    batch: int = Field(ge=1)
    """Global batch, in samples."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Samples per forward pass and GPU; None is the global batch over the number of GPUs."""
    max_length_tokens: int = Field(default=8192, ge=1)
    """Longer rows are cut; the model's own limit cuts as well."""
    clip_norm: float | None = Field(default=None, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    gradient_checkpointing: bool = False

    @property
    def tuned_on(self) -> list[str]:
        """Names of the sources whose `sft` split it draws."""
        return [source for source, _, split in (subset.partition(".") for subset in self.data) if split == "sft"]

    @model_validator(mode="after")
    def _prunes_something(self) -> Stage:
        if self.pruned and not self.tuned_on:
            raise ValueError("pruned: true draws less of sft splits, and the stage's data has none; drop it")
        return self

    def samples_at_once(self, processes: int) -> int:
        """Samples per forward pass of each of so many processes.

        Raises:
            ValueError: they cannot share the global batch evenly.
        """
        micro = self.micro_batch or max(1, self.batch // processes)
        if self.batch % (micro * processes):
            raise ValueError(
                f"stage {self.name}: batch {self.batch} is not a multiple of micro_batch {micro} times {processes} gpus"
            )
        return micro


class Run(Section):
    """How a stage is run."""

    precision: Precision = "bf16"
    zero: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    gpus: int = Field(default=1, ge=1)
    """Processes under torchrun (one per GPU; on a machine without one, CPU processes)."""
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """Longest time between two checkpoints of an unfinished stage."""
    max_skipped_share: float = Field(default=0.01, ge=0, le=1)
    """Share of a step's records, rounded up, that may turn out to be unusable (a medium that is gone or damaged, an
    answer that `max_length_tokens` cuts off whole): they are named and left out. More of them end the step."""


class TrainSettings(Run):
    """The stages and how they are run."""

    stages: list[Stage | None] = Field(min_length=1)
    """One per training step of the pipeline, in its order; null, or a list that ends earlier, leaves a step out."""

    @property
    def run(self) -> Run:
        """How they are run alone."""
        return self.part(Run)

    @property
    def pruned(self) -> set[str]:
        """Names of the sources of whose SFT split some stage takes only what pruning kept."""
        return {source for stage in self.stages if stage and stage.pruned for source in stage.tuned_on}

    @model_validator(mode="after")
    def _batches_are_whole(self) -> TrainSettings:
        if not any(self.stages):
            raise ValueError("no stage is left")
        for stage in filter(None, self.stages):
            stage.samples_at_once(self.gpus)
        return self
