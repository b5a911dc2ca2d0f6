"""The model's configuration: one frozen record, and its translation to and from the reference's `config.json` keys.

Sizes of the sub-models stay plain dictionaries in Hugging Face's own keys, so that nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from nvila.components.contracts.errors import ConfigError
from nvila.components.data.sampling import Sampling
from nvila.components.model.config.carried import carried_keys
from nvila.components.model.config.encoders import NAMESPACE
from nvila.components.model.config.fields import S2_MODES, VISION_MODES, config_fields
from nvila.components.model.config.rope import most_positions, with_rope

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
    sampling: Sampling
    """Which frames of a video."""
    video_pool_sizes: tuple[tuple[int, int, int], ...]
    """(time, vertical, horizontal) of each scale; `((1, 1, 1),)` pools nothing."""
    video_texts: tuple[str, str, str] = LINE_BREAK_AFTER
    """Before each pooled frame, behind it, and behind each pooling scale; their tokens are embedded there."""
    soft_ce_std: float = 1.0
    """Width, in token ids, of the target that a time token has in the loss."""
    time_tokens: int = 0
    """Time tokens that the checkpoint's vocabulary has, as its configuration says; 0 where it does not say."""
    carried: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Top-level keys of `config.json` that decide nothing here: they go where the model goes."""
    generation: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The checkpoint's `generation_config.json`, carried likewise; empty where there is none."""

    def __post_init__(self) -> None:
        if self.vision_mode not in VISION_MODES:
            raise ConfigError(
                "unknown vision mode",
                where="vision_mode",
                value=self.vision_mode,
                do=f"Use one of {', '.join(VISION_MODES)}",
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

    @property
    def positions(self) -> int:
        """Most positions of a prompt with its answer."""
        return most_positions(self.llm, self.max_length_tokens)

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
            "num_video_frames": self.sampling.frames,
            "fps": self.sampling.fps,
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
            **self.carried,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Read the reference's `config.json` with `llm_cfg`, `vision_tower_cfg` and `mm_projector_cfg` as dictionaries.

        Keys that older checkpoints lack take the reference's defaults (12 tiles, plain encoders).

        Raises:
            ConfigError: a key is missing or asks for something that this model does not compute.
        """
        return cls(**config_fields(content, where), carried=carried_keys(content))


class VideoSettings(Protocol):
    """What `model_config` reads of the recipe's `model.video`."""

    @property
    def frames(self) -> int: ...  # noqa: D102
    @property
    def fps(self) -> float: ...  # noqa: D102
    @property
    def pool_sizes(self) -> Sequence[tuple[int, int, int]]: ...  # noqa: D102


class Architecture(Protocol):
    """What `model_config` reads of the recipe's `model` section, with or without `base`."""

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
        sampling=Sampling(settings.video.frames, settings.video.fps),
        video_pool_sizes=tuple((t, h, w) for t, h, w in settings.video.pool_sizes),
    )


def with_vocabulary(config: ModelConfig, vocabulary: int) -> ModelConfig:
    """`config` for a tokenizer of `vocabulary` saved tokens."""
    return replace(config, llm={**config.llm, "vocab_size": vocabulary})
