"""The one way from files to a model's media, so that training, questions and servers see the same frames."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nvila.components.data.media import Limits, load_image, load_video_frames

if TYPE_CHECKING:
    from nvila.components.model.config.config import ModelConfig
    from nvila.components.model.vision.preprocess import Kind, Medium


def load_medium(path: Path, kind: Kind, config: ModelConfig, limits: Limits | None = None) -> Medium:
    """A picture, or the frames of a clip that the model takes.

    Raises:
        MediaError: it cannot be read, or is larger than `limits` (by default `Limits()`).
    """
    limits = limits or Limits()
    if kind == "image":
        return load_image(path, limits)
    return load_video_frames(path, config.sampling, limits)
