"""The size of a model without its weights: parameters of each part, and what a picture or a video costs.

Training counts its work with it, and `nvila plan` work and memory before there is a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nvila.components.model.work import Load

if TYPE_CHECKING:
    from nvila.components.model.config.config import ModelConfig

PARTS = ("vision_tower", "mm_projector", "llm")


@dataclass(frozen=True)
class Seen:
    """What one sample shows the model, at most."""

    tokens: int
    """Decoder positions."""
    tiles: int
    """Pictures that the tower sees."""
    projected: int
    """Tokens that leave the projector; pooling of a video comes after it."""

    def load(self, text_tokens: float, length: int) -> Load:
        """What the model computes of it and of a text beside it, in a row of at most `length` positions.

        Every position that is not visual is taken to be predicted.
        """
        positions = min(self.tokens + text_tokens, length)
        return Load(
            tiles=self.tiles,
            projected=self.projected,
            positions=positions,
            pairs=positions * positions / 2,
            predicted=max(positions - self.tokens, 0),
        )


@dataclass(frozen=True)
class Shape:
    """Counts that memory and work follow from."""

    config: ModelConfig
    parameters: dict[str, int]
    """By part; a tied output layer counts once."""
    tower_matrices: int
    """Parameters of the tower's patch embedding and of its blocks that are computed."""
    decoder_matrices: int
    """Parameters of the decoder's blocks."""
    linears: dict[str, tuple[tuple[int, int], ...]]
    """Of the computed blocks of tower and decoder: outputs and inputs of each Linear."""
    norms: int
    """Parameters of the layer norms in the tower's computed blocks."""
    projector_inputs: int
    """Channels entering and, before an activation function, leaving the projector's layers, by token: what they save
    for the backward pass."""
    image: Seen
    video: Seen

    @property
    def total(self) -> int:
        """Parameters of all parts."""
        return sum(self.parameters.values())

    @property
    def tower_blocks(self) -> int:
        """Blocks of the tower that are computed."""
        from nvila.components.model.vision.tower import used_blocks

        return used_blocks(int(self.config.vision["num_hidden_layers"]), self.config.select_layer)

    @property
    def tower_tokens(self) -> int:
        """Tokens of one tile inside the tower."""
        return self.config.features_per_side**2


def count(config: ModelConfig) -> Shape:
    """Counts of a configuration."""
    from torch import nn

    from nvila.components.model.checkpoint.describe import image_tokens, video_tokens
    from nvila.components.model.nvila import empty_model
    from nvila.components.model.vision.tower import used_blocks
    from nvila.components.model.vision.visual import token_count

    model = empty_model(config)
    blocks = model.vision_tower.encoder.layers
    used = blocks[: used_blocks(len(blocks), config.select_layer)]
    s2 = config.vision_mode == "s2"
    frame_tiles = sum(side**2 for side in config.scale_tiles) if s2 else 1
    square = (config.scale_tiles[-1],) * 2 if s2 else None
    frame_tokens = token_count("image", square, 1, config) - 1
    projector = 0
    layers = list(model.mm_projector.modules())
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Linear):
            projector += layer.in_features + (layer.out_features if isinstance(following, nn.GELU) else 0)
        elif isinstance(layer, nn.LayerNorm):
            projector += layer.normalized_shape[0]
    return Shape(
        config=config,
        parameters={part: _size(getattr(model, part)) for part in PARTS},
        tower_matrices=_size(used) + _size(model.vision_tower.embeddings.patch_embedding),
        decoder_matrices=_size(model.llm.model.layers),
        linears={"vision_tower": _linears(used), "llm": _linears(model.llm.model.layers)},
        norms=sum(_size(module) for module in used.modules() if isinstance(module, nn.LayerNorm)),
        projector_inputs=projector,
        image=Seen(image_tokens(config)[1], _image_tiles(config), image_tokens(config)[1]),
        video=Seen(
            video_tokens(config),
            config.sampling.frames * frame_tiles,
            config.sampling.frames * frame_tokens,
        ),
    )


def _linears(blocks: Any) -> tuple[tuple[int, int], ...]:
    from torch import nn

    return tuple((one.out_features, one.in_features) for one in blocks.modules() if isinstance(one, nn.Linear))


def _image_tiles(config: ModelConfig) -> int:
    """Most tiles of a picture."""
    if config.vision_mode == "dynamic":
        return config.max_tiles + (config.max_tiles > 1)
    if config.vision_mode == "s2":
        return sum(side**2 for side in config.scale_tiles)
    if config.vision_mode == "dynamic_s2":
        return sum(side**2 for side in config.scale_tiles[:-1]) + config.max_tiles
    return 1


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
