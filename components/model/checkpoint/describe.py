"""What a checkpoint is, from its configuration and the headers of its files: `nvila inspect`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.foreign import reading
from nvila.components.model.checkpoint.flat import open_checkpoint
from nvila.components.model.checkpoint.layouts import PARTS, Checkpoint, Layout
from nvila.components.model.checkpoint.quantized import PER_INT32
from nvila.components.model.checkpoint.tensorfile import FLOATING, Stored
from nvila.components.model.checkpoint.weights import HEAD, tied
from nvila.components.model.config.config import LINE_BREAK_AFTER, ModelConfig
from nvila.components.model.config.variants import variant_of
from nvila.components.model.vision.tiling import candidate_grids
from nvila.components.model.vision.visual import Lengths, token_count

GROUP = 128
"""Weights that share a scale and a zero point in W4A16, as in llm-awq."""
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
    """Values by part, scales and zero points of quantized ones left out; a tied output layer is not stored and does not
    count."""
    image_tokens: tuple[int, int]
    """Fewest and most positions that a picture alone takes in the decoder."""
    one_tile_tokens: int
    """Positions of a picture among others."""
    video_tokens: int
    """Positions of a video of the configured number of frames."""
    bf16_bytes: int
    w4a16_bytes: int
    """With the Linears of the decoder's blocks in 4 bits, and everything else in bf16."""
    stored_bytes: int
    schemes: dict[str, int]
    """Quantized Linears by scheme; empty for plain weights."""
    output_layer: str
    """Whether it is the embeddings."""


def describe(folder: Path | str) -> Description:
    """Describe a checkpoint of any layout; no tensor is read.

    Raises:
        DataError: no checkpoint, or broken files.
        ConfigError: weights of an unknown quantization, or not what this model computes.
    """
    with reading(folder):
        return _described(open_checkpoint(folder))


def _described(checkpoint: Checkpoint) -> Description:
    config, tensors = checkpoint.config, checkpoint.tensors
    weights, schemes = _weights(tensors, str(checkpoint.folder))
    parameters = {part: sum(n for name, n in weights.items() if name.startswith(f"{part}.")) for part in PARTS}
    total = sum(parameters.values())
    packed = sum(elements for name, elements in weights.items() if _BLOCK_LINEAR.fullmatch(name))
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
        stored_bytes=sum(tensor.bytes for tensor in tensors.values()),
        schemes=schemes,
        output_layer=_output_layer(config, HEAD in tensors),
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
    frames = config.sampling.frames
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
        ("output layer", description.output_layer),
        ("all", f"{sum(description.parameters.values()):,} parameters"),
        ("picture alone", f"{tokens[0]} to {tokens[1]} tokens" if tokens[0] != tokens[1] else f"{tokens[0]} tokens"),
        ("picture among others", f"{description.one_tile_tokens} tokens"),
        (f"video of {config.sampling.frames} frames", f"{description.video_tokens} tokens"),
        *((f"quantized to {scheme}", f"{count} Linears") for scheme, count in description.schemes.items()),
        *(("asked to sample with", text) for text in [_sampling(config)] if text),
        ("weights as stored", _size(description.stored_bytes)),
        ("weights in bf16", _size(description.bf16_bytes)),
        ("weights in W4A16", f"{_size(description.w4a16_bytes)} (decoder blocks in 4 bits, the rest bf16)"),
    ]
    if description.layout == "serving":
        rows.append(("note", "a serving folder leaves out the tower's unused blocks"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _weights(tensors: Mapping[str, Stored], where: str) -> tuple[dict[str, int], dict[str, int]]:
    """Number of values of each weight by its plain name, and quantized Linears by scheme (see `quantized`)."""
    weights: dict[str, int] = {}
    schemes: Counter[str] = Counter()
    for name, tensor in tensors.items():
        linear, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            rows, columns = tensor.shape
            weights[f"{linear}.weight"] = rows * columns * PER_INT32
            schemes["W4A16"] += 1
        elif kind == "weight" and tensor.code == "I8" and f"{linear}.weight_scale" in tensors:
            weights[name] = tensor.elements
            schemes["W8A8"] += 1
        elif kind in ("weight_scale", "weight_zero_point", "weight_shape"):
            continue
        elif tensor.code in FLOATING:
            weights[name] = tensor.elements
        else:
            raise ConfigError("a quantization that is not known here", where=where, value=f"{name}: {tensor.code}")
    return weights, dict(schemes)


def _output_layer(config: ModelConfig, stored: bool) -> str:
    if not tied(config):
        return "its own" if stored else "missing"
    return "stored, though said to be the embeddings: loading compares them" if stored else "the embeddings"


def _sampling(config: ModelConfig) -> str:
    """What the checkpoint's `generation_config.json` asks readers for that sample; ours do as they are told."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    return ", ".join(f"{name} {config.generation[name]}" for name in names if name in config.generation)


def _mark_lengths(config: ModelConfig, tokenizer: Path) -> Lengths:
    if config.video_texts == LINE_BREAK_AFTER:
        return (0, 1, 0)
    from nvila.components.model.text.tokenizer import TokenIds, load_tokenizer

    start, end, sep = TokenIds.of(load_tokenizer(tokenizer), config.video_texts).video_marks or ((), (0,), ())
    return len(start), len(end), len(sep)


def _square(config: ModelConfig) -> tuple[int, int]:
    return (config.scale_tiles[-1], config.scale_tiles[-1])
