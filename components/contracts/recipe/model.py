"""Recipe section `model`: the shape of the VLM and where its first weights come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from nvila.components.contracts.projectors import projection
from nvila.components.contracts.recipe.section import Section

VisionMode = Literal["resize", "pad", "dynamic", "s2", "dynamic_s2"]


class TowerSizes(Section):
    """Sizes of a SigLIP vision tower that is made from scratch."""

    hidden: PositiveInt = 96
    layers: PositiveInt = 3
    heads: PositiveInt = 3
    mlp: PositiveInt = 192
    patch_pixels: PositiveInt = 14

    @model_validator(mode="after")
    def _heads_fit(self) -> TowerSizes:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        return self


class DecoderSizes(Section):
    """Sizes of a Qwen2 decoder that is made from scratch."""

    hidden: PositiveInt = 128
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    mlp: PositiveInt = 256
    vocabulary: PositiveInt = 512
    """Upper bound of the BPE vocabulary, special tokens included."""

    @model_validator(mode="after")
    def _heads_fit(self) -> DecoderSizes:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden {self.hidden} must be a multiple of heads {self.heads}, and those of kv_heads {self.kv_heads}"
            )
        return self


class Base(Section):
    """Where stage 1 starts: published weights, or (tiny recipes) a small model made here."""

    vision_tower: str | None = None
    """Path, `s3://` URI or `hf://id@revision` of a SigLIP tower; None makes one from `tower`."""
    llm: str | None = None
    """Path, `s3://` URI or `hf://id@revision` of a Qwen2 decoder with its tokenizer; None makes one from `decoder`."""
    tower: TowerSizes = TowerSizes()
    decoder: DecoderSizes = DecoderSizes()
    tower_epochs: float = Field(default=8.0, gt=0)
    """Passes over the label records while a tower made from scratch learns."""
    learning_rate: float = Field(default=2e-3, gt=0)
    batch: int = Field(default=128, ge=1)

    @model_validator(mode="after")
    def _both_or_none(self) -> Base:
        if (self.vision_tower is None) != (self.llm is None):
            raise ValueError("vision_tower and llm go together: name both, or neither to make a small model here")
        return self


class Video(Section):
    """How a video becomes tokens: frames, then pooling (paper section 2.2)."""

    frames: int = Field(default=8, ge=1, le=4096)
    """How many; the most of them where `fps` is set."""
    fps: float = Field(default=0.0, ge=0)
    """Frames per second taken from the beginning of a clip; 0 spreads the frames evenly over all of it."""
    pool_sizes: list[tuple[PositiveInt, PositiveInt, PositiveInt]] = Field(default=[(1, 1, 1)], min_length=1)
    """Temporal, vertical and horizontal pooling; one entry per scale."""


class ModelSettings(Section):
    """Architecture of the model."""

    vision_mode: VisionMode = "dynamic_s2"
    projector: str = "mlp_downsample"
    """One of the reference's names, or `token_learner_N` or `perceiver_N` with the number of tokens of a tile."""
    s2_scales: list[PositiveInt] = Field(default=[448, 896, 1344], min_length=1)
    """Pixels per side of each scale, ascending. The first is the tile, the tower's input; without S2 used alone."""
    s2_output_scale: int = -1
    """Index of the scale whose feature map the others are resized to."""
    max_tiles: int = Field(default=12, ge=1, le=48)
    select_layer: int = -2
    """Which of the tower's hidden states is the feature; the blocks above it are not computed."""
    max_length_tokens: int = Field(default=8192, ge=1)
    video: Video = Video()
    base: Base

    @field_validator("projector")
    @classmethod
    def _is_one(cls, name: str) -> str:
        return projection(name).name

    @property
    def tile_pixels(self) -> int:
        """Side of one tile: the tower's input."""
        return self.s2_scales[0]

    @model_validator(mode="after")
    def _fits(self) -> ModelSettings:
        if sorted(set(self.s2_scales)) != self.s2_scales:
            raise ValueError("s2_scales must be ascending, each scale once")
        if self.vision_mode in ("s2", "dynamic_s2"):
            if len(self.s2_scales) < 2:
                raise ValueError(f"vision_mode {self.vision_mode} needs at least two s2_scales")
            if any(scale % self.tile_pixels for scale in self.s2_scales):
                raise ValueError("each of s2_scales must be a multiple of the first")
            if not -len(self.s2_scales) <= self.s2_output_scale < len(self.s2_scales):
                raise ValueError("s2_output_scale names no entry of s2_scales")
            needed = (self.s2_scales[-1] // self.tile_pixels) ** 2
            if self.vision_mode == "dynamic_s2" and self.max_tiles < needed:
                raise ValueError(f"max_tiles {self.max_tiles} is less than the {needed} tiles of the last of s2_scales")
            single = self.vision_mode == "s2" or self.s2_output_scale % len(self.s2_scales) == 0
            if projection(self.projector).cell == 3 and not single:
                raise ValueError(
                    f"projector {self.projector} and vision_mode {self.vision_mode} cannot work together: "
                    "S2 blocks are projected one by one and a 3x3 cell would cross or pad their borders; "
                    "use mlp_downsample, s2_output_scale 0, or vision_mode s2 or dynamic"
                )
        for pool in self.video.pool_sizes:
            if self.video.frames % pool[0]:
                raise ValueError(f"video.frames {self.video.frames} is not a multiple of the temporal pool {pool[0]}")
        if self.base.vision_tower is None and self.tile_pixels % self.base.tower.patch_pixels:
            raise ValueError("base.tower.patch_pixels must divide the first of s2_scales")
        return self
