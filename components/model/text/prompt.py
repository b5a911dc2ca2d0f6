"""One sample ready for the model: its turns, its media as tiles, and the markers that stand for them.

The only place that decides between tiling and one tile, so that training, scoring and generation cannot differ: a
picture is tiled when it is the sample's only one, clips beside it or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from nvila.components.model.config.config import ModelConfig
from nvila.components.model.text.conversation import IMAGE_TOKEN, VIDEO_TOKEN, Encoded, TurnLike, encode
from nvila.components.model.text.timetokens import Times, times_of
from nvila.components.model.vision.preprocess import Medium, Visual, preprocess_image, preprocess_video


@dataclass(frozen=True)
class Prompt:
    """A conversation and its media."""

    turns: Sequence[TurnLike]
    visuals: Sequence[Visual] = ()
    markers: Sequence[str] | None = None
    """Text for each medium; None takes each literal in a human turn for one medium."""
    system: str | None = None
    """System prompt; None takes the template's own, "" none."""
    time_tokens: int = 0
    """How many the model has."""

    @property
    def times(self) -> Times | None:
        """What times are in it; as of `times_of`."""
        return times_of(self.time_tokens, [visual.seconds for visual in self.visuals if visual.kind == "video"])

    def encode(self, tokenizer: Any, *, generate: bool = False) -> Encoded:
        """Token ids and labels, as `conversation.encode`; seconds in the turns are time tokens then."""
        turns = self.times.in_turns(self.turns) if self.times else self.turns
        return encode(tokenizer, turns, system=self.system, generate=generate, markers=self.markers)


def make_prompt(
    turns: Sequence[TurnLike],
    media: Sequence[Medium],
    config: ModelConfig,
    *,
    tile_all: bool = False,
    pixels: bool = False,
    system: str | None = None,
) -> Prompt:
    """Preprocess the media of one sample.

    Args:
        turns: the conversation; see `conversation.messages_of` for where media go.
        media: pictures, or lists of frames for videos, in order.
        config: the architecture.
        tile_all: tile every picture of a multi-picture sample, as the reference does in training; False leaves them
            one tile each.
        pixels: keep tiles as uint8.
        system: system prompt; None takes the template's own.
    """
    alone = tile_all or sum(isinstance(medium, Image.Image) for medium in media) == 1
    visuals: list[Visual] = []
    markers: list[str] = []
    for medium in media:
        if not isinstance(medium, Image.Image):
            visuals.append(preprocess_video(medium, config, pixels=pixels))
            markers.append(VIDEO_TOKEN)
            continue
        tiles = preprocess_image(medium, config, alone=alone, pixels=pixels)
        visuals += tiles
        markers.append(picture_marker(config, alone, len(tiles)))
    return Prompt(turns, visuals, markers, system, config.time_tokens)


def picture_marker(config: ModelConfig, alone: bool, tiles: int = 1) -> str:
    """Text of a picture: as in the reference, each tile of dynamic tiling stands on a line of its own."""
    return f"{IMAGE_TOKEN}\n" * tiles if config.vision_mode == "dynamic" and alone else IMAGE_TOKEN
