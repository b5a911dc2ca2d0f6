"""The fields of a `ModelConfig` out of the reference's `config.json`: defaults, refusals and what goes with what.

Keys without a bearing on each other are in the table of `refusals`, the two encoders in `encoders`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nvila.components.contracts.errors import ConfigError
from nvila.components.data.sampling import Sampling
from nvila.components.model.config import refusals
from nvila.components.model.config.encoders import check_image_encoder, read_video_encoder
from nvila.components.model.config.refusals import refuse

S2_MODES = ("s2", "dynamic_s2")
VISION_MODES = ("resize", "pad", "dynamic", *S2_MODES)
MOST_TILES, MOST_FRAMES, MOST_BLOCKS, MOST_SIDE = 4096, 4096, 1024, 2**16
"""What no model of this kind comes near: larger numbers are damage, and would be looped over."""
NO_LIMIT = 10**9
"""Tokenizers that know no longest input carry numbers above this."""


def config_fields(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `ModelConfig`; see its `from_json`.

    Raises:
        ConfigError: a key is missing or asks for something that this model does not compute.
    """
    refuse(content, refusals.CONFIG, where)
    try:
        llm, vision = dict(content["llm_cfg"]), dict(content["vision_tower_cfg"])
        projector = content["mm_projector_cfg"]["mm_projector_type"]
        if not isinstance(projector, str):
            raise TypeError(f"mm_projector_type is {projector!r}")
        refuse(vision, refusals.TOWER, f"{where}: vision_tower_cfg")
        refuse(llm, refusals.DECODER, f"{where}: llm_cfg")
        needed = [(vision, key) for key in ("hidden_size", "image_size", "patch_size", "num_hidden_layers")]
        for part, key in [*needed, (llm, "hidden_size"), (llm, "vocab_size")]:
            most = MOST_BLOCKS if key == "num_hidden_layers" else MOST_SIDE if part is vision else None
            part[key] = _whole({key: int(part[key])}, key, 0, where, least=1, most=most)
        _check_sizes(vision, f"{where}: vision_tower_cfg")
        _check_sizes(llm, f"{where}: llm_cfg")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError("incomplete model configuration", where=where, value=str(error)) from None
    check_image_encoder(content.get("image_encoder"), where)
    mode = _mode(content, where)
    side = vision["image_size"]
    scales = _scales(content.get("s2_scales"), where) if mode in S2_MODES else (side,)
    if not scales or scales[0] < 1 or (scales[-1] // scales[0]) ** 2 > MOST_TILES:
        raise ConfigError("not the pixels of scales", where=f"{where}: s2_scales", value=content.get("s2_scales"))
    if content.get("vision_resolution") not in (None, -1, side):
        raise ConfigError(
            f"the tower's positions are not stretched from {side} pixels",
            where=f"{where}: vision_resolution",
            value=content["vision_resolution"],
            do="Use -1, or a tower of that image_size",
        )
    if mode in S2_MODES and content.get("s2_max_split_size") not in (None, scales[0]):
        raise ConfigError(
            f"each tile has {scales[0]} pixels, the first scale",
            where=f"{where}: s2_max_split_size",
            value=content["s2_max_split_size"],
        )
    lengths = ("tokenizer_model_max_length", "model_max_length")
    named = [_whole(llm, key, 0, f"{where}: llm_cfg", least=0) for key in lengths]
    length = next((length for length in named if length), NO_LIMIT)
    for runtime in (*lengths, "tokenizer_padding_side"):
        llm.pop(runtime, None)
    pools, texts = read_video_encoder(content.get("video_encoder"), where)
    return {
        "vision": vision,
        "llm": llm,
        "projector": projector,
        "vision_mode": mode,
        "s2_scales": scales,
        "s2_output_scale": _whole(content, "s2_resize_output_to_scale_idx", 0, where),
        "max_tiles": _whole(content, "max_tiles", 12, where, least=1, most=MOST_TILES),
        "select_layer": _whole(content, "mm_vision_select_layer", -2, where),
        "max_length_tokens": length if length < NO_LIMIT else 8192,
        "sampling": Sampling(
            _whole(content, "num_video_frames", 8, where, least=1, most=MOST_FRAMES),
            _number(content, "fps", 0.0, where),
        ),
        "video_pool_sizes": pools,
        "video_texts": texts,
        "soft_ce_std": _number(content, "soft_ce_std", 1.0, where, above=True),
        "time_tokens": _time_tokens(content, where),
    }


def _check_sizes(part: Mapping[str, Any], where: str) -> None:
    """Numbers of a part that no tensor's shape tells, as far as they are there."""
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim"):
        _whole(part, key, 1, where, least=1, most=MOST_BLOCKS if key == "num_hidden_layers" else None)
    _whole(part, "max_position_embeddings", 1, where, least=1, most=NO_LIMIT)
    for key in ("layer_norm_eps", "rms_norm_eps"):
        if _number(part, key, 1e-6, where, above=True) > 0.1:
            raise ConfigError("above 0.1", where=f"{where}: {key}", value=part[key])


def _time_tokens(content: Mapping[str, Any], where: str) -> int:
    """Time tokens that the configuration speaks of: by their number, by the ids that its loss reads, or by both."""
    number, ids = _whole(content, "num_time_tokens", 0, where, least=0), content.get("time_token_ids") or []
    if not isinstance(ids, list) or (number and ids and len(ids) != number):
        raise ConfigError(f"num_time_tokens is {number}", where=f"{where}: time_token_ids", value=ids)
    return number or len(ids)


def _mode(content: Mapping[str, Any], where: str) -> str:
    """`dynamic_s2` and `s2` choose the tower, `image_aspect_ratio` how pictures are cut; only matching pairs pass."""
    ratio = content.get("image_aspect_ratio")
    fitting: tuple[str, ...] = ("resize", "pad", "dynamic")
    mode = str(ratio)
    if content.get("dynamic_s2"):
        mode, fitting = "dynamic_s2", ("dynamic_s2",)
    elif content.get("s2"):
        mode, fitting = "s2", ("resize",)
    if ratio not in fitting and (ratio is not None or mode not in S2_MODES):
        raise ConfigError(
            f"unsupported aspect mode{f' with {mode}' if mode in S2_MODES else ''}",
            where=f"{where}: image_aspect_ratio",
            value=ratio,
            do=f"Use one of {', '.join(fitting)}",
        )
    return mode


def _scales(value: Any, where: str) -> tuple[int, ...]:
    """The scales, a comma list in one string or a list, sorted ascending."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(sorted(int(part) for part in parts))
    except (TypeError, ValueError):
        raise ConfigError("not a list of scales", where=f"{where}: s2_scales", value=value) from None


def _whole(
    content: Mapping[str, Any], key: str, default: int, where: str, *, least: int | None = None, most: int | None = None
) -> int:
    """A whole number; `default` where the key is absent or null."""
    value = content.get(key)
    if value is None:
        return default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not float(value).is_integer():
        raise ConfigError("not a whole number", where=f"{where}: {key}", value=value)
    if least is not None and value < least:
        raise ConfigError(f"below {least}", where=f"{where}: {key}", value=value)
    if most is not None and value > most:
        raise ConfigError(f"above {most}", where=f"{where}: {key}", value=value)
    return int(value)


def _number(content: Mapping[str, Any], key: str, default: float, where: str, *, above: bool = False) -> float:
    """A finite number that is not negative, or above 0; `default` where the key is absent or null."""
    value = content.get(key)
    if value is None:
        return default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf or (above and value == 0):
        raise ConfigError(f"not a number {'above' if above else 'from'} 0", where=f"{where}: {key}", value=value)
    return float(value)
