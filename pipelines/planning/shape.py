"""The model of a recipe without its weights: parameters of each part, and what a picture or a video costs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.recipe.model import DecoderSizes, ModelSettings

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


def shape_of(settings: ModelSettings, decoder: DecoderSizes | None = None) -> Shape | None:
    """Counts of a recipe's model, from modules on the meta device; None where the sizes of its weights are not known.

    With `decoder` it has one of these sizes in place of its own. Sizes come from the recipe, from a local folder's
    `config.json`, or from the published models that the names of `hf://` weights say.
    """
    from nvila.components.initialize.scratch import decoder_config, tower_config
    from nvila.components.model.config.config import model_config
    from nvila.components.model.fresh import with_decoder

    base = settings.base
    if base.vision_tower and base.llm:
        vision, llm = _named(base.vision_tower, "vision_config"), _named(base.llm)
        if vision is None or llm is None:
            return None
    else:
        vision, llm = tower_config(base.tower, settings.tile_pixels), decoder_config(base.decoder, settings)
    config = model_config(settings, vision, llm)
    return count(with_decoder(config, decoder.model_dump(exclude={"vocabulary"})) if decoder else config)


def shape_at(place: str) -> Shape | None:
    """Counts of a whole model by where it lies: a folder, or `hf://` with the name of a published variant; None where
    that does not say."""
    from nvila.components.model.checkpoint.layouts import checkpoint_root, read_native_config
    from nvila.components.model.config.variants import VARIANTS

    if "://" in place:
        name = place.rpartition("/")[2].partition("@")[0]
        return count(VARIANTS[name]) if name in VARIANTS else None
    try:
        return count(read_native_config(checkpoint_root(Path(place))))
    except (NvilaError, OSError):
        return None


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
        projector_inputs=projector,
        image=Seen(image_tokens(config)[1], _image_tiles(config), image_tokens(config)[1]),
        video=Seen(
            video_tokens(config),
            config.sampling.frames * frame_tiles,
            config.sampling.frames * frame_tokens,
        ),
    )


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


def _named(uri: str, section: str = "") -> dict[str, Any] | None:
    """Configuration of weights: of a local folder, or of a published model by its name."""
    from nvila.components.model.config import variants

    if "://" not in uri:
        path = Path(uri, "config.json")
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return content.get(section, content) if content else None
    known = {
        "siglip-so400m-patch14-448": variants.SIGLIP,
        "Qwen2.5-1.5B-Instruct": variants.QWEN_1_5B,
        "Qwen2.5-7B-Instruct": variants.QWEN_7B,
        "Qwen2.5-14B-Instruct": variants.QWEN_14B,
    }
    name = uri.rpartition("/")[2].partition("@")[0]
    return next((sizes for known_name, sizes in known.items() if name.endswith(known_name)), None)
