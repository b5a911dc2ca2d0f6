"""What a row of the stage table may change of the model: from that stage on, in its checkpoint and all that follow."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from nvila.components.contracts.recipe.model import ModelSettings, Pool
from nvila.components.contracts.recipe.section import Section, Tokens


class VideoChanges(Section):
    """What becomes of `model.video`; null leaves it as it is."""

    frames: int | None = Field(default=None, ge=1, le=4096)
    """How many; the most of them where `fps` is set."""
    fps: float | None = Field(default=None, ge=0, le=1000)
    """Frames per second taken from the beginning of a clip; 0 spreads the frames evenly over all of it."""
    pool_sizes: list[Annotated[tuple[Pool, Pool, Pool], Field(strict=False)]] | None = Field(
        default=None, min_length=1, max_length=16
    )
    """Temporal, vertical and horizontal pooling; one entry per scale."""


class ModelChanges(Section):
    """What becomes of the model; null leaves it as it is."""

    video: VideoChanges = VideoChanges()
    """How a clip becomes tokens from this stage on."""
    max_length_tokens: Tokens | None = None
    """Longest row from this stage on, pictures and clips included."""
    time_tokens: int | None = Field(default=None, ge=2, le=1000)
    """Tokens `<t0>`, `<t1>`, ... that are added and divide a clip evenly: seconds such as `<1.5>` in questions and
    answers about a clip are read and said by them."""

    def of(self, model: ModelSettings) -> ModelSettings:
        """The model's section after the changes; of a whole model, whose architecture it does not hold, the same one.

        Raises:
            ValidationError: what comes out does not go together.
        """
        if model.base.model is not None:
            return model
        content: dict[str, Any] = model.model_dump()
        changes = self.model_dump(exclude_none=True, exclude={"time_tokens"})
        content["video"] |= changes.pop("video")
        return ModelSettings.model_validate(content | changes)
