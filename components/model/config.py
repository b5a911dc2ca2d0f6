"""The model's configuration: one frozen record, and its translation to and from the reference's `config.json` keys.

Sizes of the sub-models stay plain dictionaries in Hugging Face's own keys, so that nothing here imports transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nvila.components.contracts.errors import ConfigError
from nvila.components.model import refusals
from nvila.components.model.encoders import NAMESPACE, check_image_encoder, read_video_encoder
from nvila.components.model.refusals import refuse
from nvila.components.model.rope import with_rope

VISION_MODES = ("resize", "pad", "dynamic", "s2", "dynamic_s2")
NO_LIMIT = 10**9
"""Tokenizers that know no longest input carry numbers above this."""
S2_MODES = ("s2", "dynamic_s2")


LINE_BREAK_AFTER = ("", "\n", "")
"""A line break behind each frame and nothing else, as all published variants have it."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of one NVILA.

    Raises:
        ConfigError: fields that cannot work together.
    """

    vision: dict[str, Any]
    """SigLIP tower, Hugging Face's `SiglipVisionConfig` keys."""
    llm: dict[str, Any]
    """Decoder, Hugging Face's `Qwen2Config` keys. `vocab_size` counts the saved tokens, not the media markers."""
    projector: str
    vision_mode: str
    s2_scales: tuple[int, ...]
    """Pixels per side, ascending; only the tile's side in modes without S2."""
    s2_output_scale: int
    max_tiles: int
    select_layer: int
    max_length_tokens: int
    num_video_frames: int
    """Frames of a video; the most of them where `fps` is set."""
    video_pool_sizes: tuple[tuple[int, int, int], ...]
    """(time, vertical, horizontal) of each scale; `((1, 1, 1),)` pools nothing."""
    video_texts: tuple[str, str, str] = LINE_BREAK_AFTER
    """Before each pooled frame, behind it, and behind each pooling scale; their tokens are embedded there."""
    fps: float = 0.0
    """Frames per second taken from the beginning of a video; 0 spreads the frames evenly over all of it."""
    soft_ce_std: float = 1.0
    """Width, in token ids, of the target that a time token has in the loss."""
    time_tokens: int = 0
    """Time tokens that the checkpoint's vocabulary has, as its configuration says; 0 where it does not say."""

    def __post_init__(self) -> None:
        if self.vision_mode not in VISION_MODES:
            raise ConfigError(
                "unknown vision mode", where="vision_mode", value=self.vision_mode, do=_one_of(VISION_MODES)
            )
        if self.vision["image_size"] != self.tile_pixels:
            raise ConfigError(
                f"the tower's image_size {self.vision['image_size']} is not the first scale",
                where="s2_scales",
                value=self.s2_scales,
            )
        if self.is_s2:
            self._check_s2()
        layers = self.vision["num_hidden_layers"]
        if not -layers - 1 <= self.select_layer <= layers:
            raise ConfigError(f"the tower has {layers} layers", where="select_layer", value=self.select_layer)
        with_rope(self.llm, self.max_length_tokens)  # refuses positions that are not computed

    def _check_s2(self) -> None:
        if any(scale % self.tile_pixels for scale in self.s2_scales) or sorted(set(self.s2_scales)) != list(
            self.s2_scales
        ):
            raise ConfigError(
                "scales must ascend and be multiples of the first", where="s2_scales", value=self.s2_scales
            )
        if not -len(self.s2_scales) <= self.s2_output_scale < len(self.s2_scales):
            raise ConfigError("names no scale", where="s2_output_scale", value=self.s2_output_scale)
        if self.vision_mode == "dynamic_s2" and self.max_tiles < self.scale_tiles[-1] ** 2:
            raise ConfigError(
                f"the last scale needs at least {self.scale_tiles[-1] ** 2} tiles",
                where="max_tiles",
                value=self.max_tiles,
            )

    @property
    def is_s2(self) -> bool:
        """Whether features of several scales are stacked."""
        return self.vision_mode in S2_MODES

    @property
    def tile_pixels(self) -> int:
        """Side of one tile: the tower's input."""
        return self.s2_scales[0]

    @property
    def scale_tiles(self) -> tuple[int, ...]:
        """Tiles per side of each scale when it is square."""
        return tuple(scale // self.tile_pixels for scale in self.s2_scales)

    @property
    def features_per_side(self) -> int:
        """Side of one tile's feature map."""
        return self.tile_pixels // int(self.vision["patch_size"])

    @property
    def mm_hidden_size(self) -> int:
        """Channels that enter the projector: the tower's width times the number of stacked scales."""
        return int(self.vision["hidden_size"]) * (len(self.s2_scales) if self.is_s2 else 1)

    @property
    def llm_hidden_size(self) -> int:
        """Width of the decoder."""
        return int(self.llm["hidden_size"])

    def to_json(self) -> dict[str, Any]:
        """The reference's top-level `config.json`."""
        pooled = self.video_pool_sizes != ((1, 1, 1),) or bool(self.video_texts[2])
        video = {"_target_": f"{NAMESPACE}.{'TSP' if pooled else 'Basic'}VideoEncoder"}
        ends = {"start_tokens": None, "end_tokens": "\n"}
        start, end, sep = (text or None for text in self.video_texts)
        pools = {"pool_sizes": [list(p) for p in self.video_pool_sizes], "sep_tokens": sep} if pooled else {}
        return {
            "architectures": ["LlavaLlamaModel"],
            "model_type": "llava_llama",
            "model_dtype": "torch.bfloat16",
            "hidden_size": self.llm_hidden_size,
            "mm_hidden_size": self.mm_hidden_size,
            "image_aspect_ratio": "resize" if self.vision_mode == "s2" else self.vision_mode,
            "s2": self.vision_mode == "s2",
            "dynamic_s2": self.vision_mode == "dynamic_s2",
            "s2_scales": ",".join(str(scale) for scale in self.s2_scales),
            "s2_max_split_size": self.tile_pixels,
            "s2_resize_output_to_scale_idx": self.s2_output_scale,
            "min_tiles": 1,
            "max_tiles": self.max_tiles,
            "video_max_tiles": 1,
            "num_video_frames": self.num_video_frames,
            "fps": self.fps,
            "interpolate_mode": "linear",
            "vision_resolution": -1,
            "mm_vision_select_layer": self.select_layer,
            "mm_vision_select_feature": "cls_patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_encoder": {"_target_": f"{NAMESPACE}.BasicImageEncoder", **ends},
            "video_encoder": {**video, **pools, "start_tokens": start, "end_tokens": end},
            "soft_ce_std": self.soft_ce_std,
            **({"num_time_tokens": self.time_tokens} if self.time_tokens else {}),
            "llm_cfg": {
                **self.llm,
                "model_max_length": self.max_length_tokens,
                "tokenizer_model_max_length": self.max_length_tokens,
                "tokenizer_padding_side": "right",
            },
            "vision_tower_cfg": dict(self.vision),
            "mm_projector_cfg": {"mm_projector_type": self.projector, "model_type": "v2l_projector"},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read the reference's `config.json` with `llm_cfg`, `vision_tower_cfg` and `mm_projector_cfg` as dictionaries.

        Keys that older checkpoints lack take the reference's defaults (12 tiles, plain encoders).

        Raises:
            ConfigError: a key is missing or asks for something that this model does not compute.
        """
        refuse(content, refusals.CONFIG, where)
        try:
            llm, vision = dict(content["llm_cfg"]), dict(content["vision_tower_cfg"])
            projector = content["mm_projector_cfg"]["mm_projector_type"]
            refuse(vision, refusals.TOWER, f"{where}: vision_tower_cfg")
            refuse(llm, refusals.DECODER, f"{where}: llm_cfg")
            needed = [(vision, key) for key in ("hidden_size", "image_size", "patch_size", "num_hidden_layers")]
            for part, key in [*needed, (llm, "hidden_size"), (llm, "vocab_size")]:
                part[key] = int(part[key])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("incomplete model configuration", where=where, value=str(error)) from None
        check_image_encoder(content.get("image_encoder"), where)
        mode = _mode(content, where)
        side = vision["image_size"]
        scales = _scales(content.get("s2_scales"), where) if mode in S2_MODES else (side,)
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
        return cls(
            vision=vision,
            llm=llm,
            projector=projector,
            vision_mode=mode,
            s2_scales=scales,
            s2_output_scale=_whole(content, "s2_resize_output_to_scale_idx", 0, where),
            max_tiles=_whole(content, "max_tiles", 12, where, least=1),
            select_layer=_whole(content, "mm_vision_select_layer", -2, where),
            max_length_tokens=length if length < NO_LIMIT else 8192,
            num_video_frames=_whole(content, "num_video_frames", 8, where, least=1),
            video_pool_sizes=pools,
            video_texts=texts,
            fps=_number(content, "fps", 0.0, where),
            soft_ce_std=_number(content, "soft_ce_std", 1.0, where, above=True),
            time_tokens=_whole(content, "num_time_tokens", 0, where, least=0),
        )


class VideoSettings(Protocol):
    """What `model_config` reads of the recipe's `model.video`."""

    @property
    def frames(self) -> int: ...  # noqa: D102
    @property
    def pool_sizes(self) -> Sequence[tuple[int, int, int]]: ...  # noqa: D102


class Architecture(Protocol):
    """What `model_config` reads of the recipe's `model` section, with or without `base` and `variant`."""

    @property
    def vision_mode(self) -> str: ...  # noqa: D102
    @property
    def projector(self) -> str: ...  # noqa: D102
    @property
    def s2_scales(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def s2_output_scale(self) -> int: ...  # noqa: D102
    @property
    def max_tiles(self) -> int: ...  # noqa: D102
    @property
    def select_layer(self) -> int: ...  # noqa: D102
    @property
    def max_length_tokens(self) -> int: ...  # noqa: D102
    @property
    def video(self) -> VideoSettings: ...  # noqa: D102


def model_config(settings: Architecture, vision: Mapping[str, Any], llm: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a recipe's `model` section asks for, over a given tower and decoder."""
    scales = tuple(settings.s2_scales)
    return ModelConfig(
        vision=dict(vision),
        llm=dict(llm),
        projector=settings.projector,
        vision_mode=settings.vision_mode,
        s2_scales=scales if settings.vision_mode in S2_MODES else scales[:1],
        s2_output_scale=settings.s2_output_scale,
        max_tiles=settings.max_tiles,
        select_layer=settings.select_layer,
        max_length_tokens=settings.max_length_tokens,
        num_video_frames=settings.video.frames,
        video_pool_sizes=tuple((t, h, w) for t, h, w in settings.video.pool_sizes),
    )


def with_vocabulary(config: ModelConfig, vocabulary: int) -> ModelConfig:
    """`config` for a tokenizer of `vocabulary` saved tokens."""
    return replace(config, llm={**config.llm, "vocab_size": vocabulary})


def _mode(content: Mapping[str, Any], where: str) -> str:
    """`dynamic_s2` and `s2` choose the tower, `image_aspect_ratio` how pictures are cut; only matching pairs pass."""
    ratio = content.get("image_aspect_ratio")
    if content.get("dynamic_s2"):
        mode, fitting = "dynamic_s2", ("dynamic_s2",)
    elif content.get("s2"):
        mode, fitting = "s2", ("resize",)
    else:
        mode, fitting = str(ratio), ("resize", "pad", "dynamic")
    if ratio not in fitting and (ratio is not None or mode not in S2_MODES):
        raise ConfigError(
            f"unsupported aspect mode{f' with {mode}' if mode in S2_MODES else ''}",
            where=f"{where}: image_aspect_ratio",
            value=ratio,
            do=_one_of(fitting),
        )
    return mode


def _scales(value: Any, where: str) -> tuple[int, ...]:
    """The scales, a comma list in one string or a list, sorted ascending."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(sorted(int(part) for part in parts))
    except (TypeError, ValueError):
        raise ConfigError("not a list of scales", where=f"{where}: s2_scales", value=value) from None


def _whole(content: Mapping[str, Any], key: str, default: int, where: str, *, least: int | None = None) -> int:
    """A whole number; `default` where the key is absent or null."""
    value = content.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not float(value).is_integer():
        raise ConfigError("not a whole number", where=f"{where}: {key}", value=value)
    if least is not None and value < least:
        raise ConfigError(f"below {least}", where=f"{where}: {key}", value=value)
    return int(value)


def _number(content: Mapping[str, Any], key: str, default: float, where: str, *, above: bool = False) -> float:
    """A finite number that is not negative, or above 0; `default` where the key is absent or null."""
    value = content.get(key)
    if value is None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value < math.inf
        or (above and value == 0)
    ):
        raise ConfigError(f"not a number {'above' if above else 'from'} 0", where=f"{where}: {key}", value=value)
    return float(value)


def _one_of(values: Sequence[str]) -> str:
    return f"Use one of {', '.join(values)}"
