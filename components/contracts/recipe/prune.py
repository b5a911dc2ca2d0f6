"""Recipe section `prune`: DeltaLoss pruning of the SFT data; paper section 2.3."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nvila.components.contracts.recipe.model import DecoderSizes
from nvila.components.contracts.recipe.section import Section


class Reference(Section):
    """A reference VLM: a checkpoint, or (tiny recipes) one trained here per fold so that it never scores its own."""

    path: str | None = None
    """Path, `s3://` URI or `hf://id@revision` of a trained VLM; None trains one."""
    decoder: DecoderSizes = DecoderSizes()
    epochs: float = Field(default=4.0, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    batch: int = Field(default=64, ge=1)


class PruneSettings(Section):
    """What stays in the SFT mixture."""

    keep_ratio: float = Field(default=0.5, gt=0, le=1)
    """Share of each source that stays: the ceil(keep_ratio * n) samples of highest DeltaLoss."""
    keep_ratio_of: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    """Keep ratio of single sources by name, where it differs."""
    score: Literal["sum", "mean"] = "sum"
    """Sum or mean over answer tokens; the paper leaves it open."""
    heldout_questions: int = Field(default=300, ge=1)
    """Held-out questions per source on which the references are compared before their scores are believed."""
    small: Reference = Reference()
    large: Reference = Reference()
