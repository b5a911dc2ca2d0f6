"""What a checkpoint is, from its configuration and the headers of its files: `nvila inspect`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nvila.components.contracts.errors import ConfigError
from nvila.components.model.config import LINE_BREAK_AFTER, ModelConfig
from nvila.components.model.layouts import PARTS, Layout, open_checkpoint
from nvila.components.model.tensorfile import FLOATING, Stored
from nvila.components.model.tiling import candidate_grids
from nvila.components.model.variants import variant_of
from nvila.components.model.visual import Lengths, token_count

GROUP = 128
"""Weights that share a scale and a zero point in W4A16; spec section 7."""
W4_BYTES = (4 + (16 + 4) / GROUP) / 8
"""Of one weight: 4 bits, and its share of a 16-bit scale and a 4-bit zero point."""
_BLOCK_LINEAR = re.compile(r"llm\.model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")


@dataclass(frozen=True)
class Description:
    """What `nvila inspect` prints."""

    layout: Layout
    config: ModelConfig
    variant: str | None
    """Name of the published variant of this architecture."""
    parameters: dict[str, int]
    """Stored values by part; a tied output layer is not stored and does not count."""
    image_tokens: tuple[int, int]
    """Fewest and most positions that a picture alone takes in the decoder."""
    one_tile_tokens: int
    """Positions of a picture among others."""
    video_tokens: int
    """Positions of a video of the configured number of frames."""
    bf16_bytes: int
    w4a16_bytes: int
    """With the Linears of the decoder's blocks in 4 bits, and everything else in bf16."""


def describe(folder: Path | str) -> Description:
    """Describe a checkpoint of any layout; no tensor is read.

    Raises:
        DataError: no checkpoint, or broken files.
        ConfigError: the stored weights are quantized already, or not what this model computes.
    """
    checkpoint = open_checkpoint(folder)
    config, tensors = checkpoint.config, checkpoint.tensors
    if any(tensor.code not in FLOATING for tensor in tensors.values()):
        raise ConfigError(
            "these weights are quantized", where=str(folder), do="Inspect the checkpoint that they were made from"
        )
    parameters = {part: _count(tensors, f"{part}.") for part in PARTS}
    total = sum(parameters.values())
    packed = sum(tensor.elements for name, tensor in tensors.items() if _BLOCK_LINEAR.fullmatch(name))
    return Description(
        layout=checkpoint.layout,
        config=config,
        variant=variant_of(config),
        parameters=parameters,
        image_tokens=image_tokens(config),
        one_tile_tokens=token_count("image", _square(config) if config.vision_mode == "s2" else None, 1, config),
        video_tokens=video_tokens(config, _mark_lengths(config, checkpoint.tokenizer)),
        bf16_bytes=2 * total,
        w4a16_bytes=round(packed * W4_BYTES) + 2 * (total - packed),
    )


def image_tokens(config: ModelConfig) -> tuple[int, int]:
    """Fewest and most decoder positions of a picture that is a prompt's only one, over all its shapes."""
    if config.vision_mode == "dynamic":
        each = token_count("image", None, 1, config) + 1  # and the line break in the text behind each tile
        return each, each * (config.max_tiles + (config.max_tiles > 1))
    if config.vision_mode == "dynamic_s2":
        grids = candidate_grids(config.scale_tiles[-1] ** 2, config.max_tiles)
        counts = [token_count("image", (rows, columns), 1, config) for columns, rows in grids]
        return min(counts), max(counts)
    block = _square(config) if config.vision_mode == "s2" else None
    return (token_count("image", block, 1, config),) * 2


def video_tokens(config: ModelConfig, marks: Lengths = (0, 1, 0)) -> int:
    """Decoder positions of a video of the configured number of frames, with marks of these lengths."""
    frames = config.num_video_frames
    if config.vision_mode == "s2":
        tiles = sum(side**2 for side in config.scale_tiles)
        return token_count("video", _square(config), frames * tiles, config, marks)
    return token_count("video", None, frames, config, marks)


def render(description: Description) -> str:
    """The description as lines for a terminal."""
    config, tokens = description.config, description.image_tokens
    scales = "/".join(str(scale) for scale in config.s2_scales)
    rows = [
        ("variant", description.variant or "none of the published ones"),
        ("layout", description.layout),
        ("vision", f"{config.vision_mode}, {scales} pixels, at most {config.max_tiles} tiles"),
        ("projector", config.projector),
        *((part, f"{count:,} parameters") for part, count in description.parameters.items()),
        ("all", f"{sum(description.parameters.values()):,} parameters"),
        ("picture alone", f"{tokens[0]} to {tokens[1]} tokens" if tokens[0] != tokens[1] else f"{tokens[0]} tokens"),
        ("picture among others", f"{description.one_tile_tokens} tokens"),
        (f"video of {config.num_video_frames} frames", f"{description.video_tokens} tokens"),
        ("weights in bf16", f"{description.bf16_bytes / 1e9:.2f} GB"),
        ("weights in W4A16", f"{description.w4a16_bytes / 1e9:.2f} GB (decoder blocks in 4 bits, the rest bf16)"),
    ]
    if description.layout == "serving":
        rows.append(("note", "a serving folder leaves out the tower's unused blocks"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _count(tensors: dict[str, Stored], prefix: str) -> int:
    return sum(tensor.elements for name, tensor in tensors.items() if name.startswith(prefix))


def _mark_lengths(config: ModelConfig, tokenizer: Path) -> Lengths:
    if config.video_texts == LINE_BREAK_AFTER:
        return (0, 1, 0)
    from nvila.components.model.tokenizer import TokenIds, load_tokenizer

    start, end, sep = TokenIds.of(load_tokenizer(tokenizer), config.video_texts).video_marks or ((), (0,), ())
    return len(start), len(end), len(sep)


def _square(config: ModelConfig) -> tuple[int, int]:
    return (config.scale_tiles[-1], config.scale_tiles[-1])
