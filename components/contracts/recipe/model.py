"""Recipe section `model`: the shape of the VLM and where its first weights come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from nvila.components.contracts.projectors import projection
from nvila.components.contracts.recipe.section import Batch, Disagreement, Name, Passes, Rate, Section, Tokens, Weights

Width = Annotated[int, Field(ge=1, le=16_384)]
"""Of models that are made here, in values; twice that of the largest that were published."""
Depth = Annotated[int, Field(ge=1, le=128)]
"""Layers of such a model."""
Heads = Annotated[int, Field(ge=1, le=256)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
"""Side of a tile or scale; a tower's attention grows with its fourth power."""
Pool = Annotated[int, Field(ge=1, le=4096)]
"""Frames, rows or columns that become one."""
LEAST_VOCABULARY = 261
"""The 256 bytes and the special tokens of a tokenizer that is made here."""
VisionMode = Literal["resize", "pad", "dynamic", "s2", "dynamic_s2"]


class TowerSizes(Section):
    """Sizes of a SigLIP vision tower that is made from scratch."""

    hidden: Width = 96
    """Values of a patch."""
    layers: Depth = 3
    """Blocks."""
    heads: Heads = 3
    """Of the attention; they divide `hidden`."""
    mlp: Annotated[int, Field(ge=1, le=65_536)] = 192
    """Values between the two layers of a block's MLP."""
    patch_pixels: Pixels = 14
    """Side of a patch; it divides the first of `s2_scales`."""

    def disagreements(self) -> Iterator[Disagreement]:
        """Heads share the width evenly."""
        if self.hidden % self.heads:
            yield Disagreement("heads", f"hidden {self.hidden} is not a multiple of heads {self.heads}", self.heads)


class DecoderSizes(Section):
    """Sizes of a Qwen2 decoder that is made from scratch."""

    hidden: Width = 128
    """Values of a token."""
    layers: Depth = 3
    """Blocks."""
    heads: Heads = 4
    """Of the attention; they divide `hidden` into an even number of values each, which positions turn in pairs."""
    kv_heads: Heads = 2
    """Heads of keys and values; they divide `heads`."""
    mlp: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Values between the layers of a block's MLP."""
    vocabulary: int = Field(default=512, ge=LEAST_VOCABULARY, le=2**20)
    """Upper bound of the BPE vocabulary, the 256 bytes and the special tokens included."""

    def disagreements(self) -> Iterator[Disagreement]:
        """Heads share the width, and groups of them the keys, evenly."""
        if self.hidden % self.heads or self.heads % self.kv_heads:
            why = (
                f"hidden {self.hidden} must be a multiple of heads {self.heads}, and those of kv_heads {self.kv_heads}"
            )
            yield Disagreement("heads", why, self.heads)
        elif (self.hidden // self.heads) % 2:
            why = f"each of {self.heads} heads would have {self.hidden // self.heads} values, which is odd"
            yield Disagreement("heads", why, self.heads)


class Base(Section):
    """Where stage 1 starts: published weights, or (tiny recipes) a small model made here; or a whole model."""

    model: Weights | None = None
    """Folder (of any layout), `s3://` URI, `hf://id@revision` or version of the registry (`NAME@ALIAS`, `NAME/NUMBER`)
    of a whole NVILA that the recipe fine-tunes; None makes one of the parts below. All else of `model` is then the
    checkpoint's."""
    vision_tower: Weights | None = None
    """Path, `s3://` URI or `hf://id@revision` of a SigLIP tower; None makes one from `tower`."""
    llm: Weights | None = None
    """Path, `s3://` URI or `hf://id@revision` of a Qwen2 decoder with its tokenizer; None makes one from `decoder`."""
    tower: TowerSizes = TowerSizes()
    """Of one that is made here."""
    decoder: DecoderSizes = DecoderSizes()
    """Of one that is made here."""
    tower_epochs: Passes = 8.0
    """Passes over the label records while a tower made from scratch learns."""
    learning_rate: Rate = 2e-3
    """Of a tower made from scratch."""
    batch: Batch = 128
    """Label records of an optimizer step of a tower made from scratch."""

    @property
    def made_here(self) -> bool:
        """Whether the model is a small one, made from nothing."""
        return self.llm is None and self.model is None

    def disagreements(self) -> Iterator[Disagreement]:
        """A model is made of two parts of one origin, or is whole already."""
        if self.model is not None:
            for name in sorted(self.model_fields_set - {"model"}):
                yield Disagreement(name, f"base.model is a whole model, which has its own {name}: take it out")
            return
        if (self.vision_tower is None) != (self.llm is None):
            missing = "llm" if self.llm is None else "vision_tower"
            yield Disagreement(
                missing, "vision_tower and llm go together: name both, or neither to make a small model here"
            )


class Video(Section):
    """How a video becomes tokens: frames, then pooling (paper section 2.2)."""

    frames: int = Field(default=8, ge=1, le=4096)
    """How many; the most of them where `fps` is set."""
    fps: float = Field(default=0.0, ge=0, le=1000)
    """Frames per second taken from the beginning of a clip; 0 spreads the frames evenly over all of it."""
    pool_sizes: list[Annotated[tuple[Pool, Pool, Pool], Field(strict=False)]] = Field(
        default=[(1, 1, 1)], min_length=1, max_length=16
    )
    """Temporal, vertical and horizontal pooling; one entry per scale."""

    def disagreements(self) -> Iterator[Disagreement]:
        """No pool begins in one clip's frames and ends beyond them."""
        for index, pool in enumerate(self.pool_sizes):
            if self.frames % pool[0]:
                why = f"video.frames {self.frames} is not a multiple of the temporal pool {pool[0]}"
                yield Disagreement(f"pool_sizes.{index}", why, pool)


class ModelSettings(Section):
    """Architecture of the model."""

    vision_mode: VisionMode = "dynamic_s2"
    """How a picture becomes tiles: one (`resize`, `pad`), as many as fit its shape (`dynamic`), several scales of one
    (`s2`), or of as many as fit (`dynamic_s2`)."""
    projector: Name = "mlp_downsample"
    """One of the reference's names, or `token_learner_N` or `perceiver_N` with the number of tokens of a tile."""
    s2_scales: list[Pixels] = Field(default=[448, 896, 1344], min_length=1, max_length=8)
    """Pixels per side of each scale, ascending. The first is the tile, the tower's input; without S2 used alone."""
    s2_output_scale: int = Field(default=-1, ge=-8, le=7)
    """Index of the scale whose feature map the others are resized to."""
    max_tiles: int = Field(default=12, ge=1, le=48)
    """Of a picture, in the modes that choose their number."""
    select_layer: int = Field(default=-2, ge=-129, le=128)
    """Which of the tower's hidden states is the feature; the blocks above it are not computed."""
    max_length_tokens: Tokens = 8192
    """Longest row, pictures and clips included."""
    video: Video = Video()
    """How a clip becomes tokens."""
    base: Base
    """Where stage 1 starts."""

    @model_serializer(mode="wrap")
    def _told(self, told: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Of a whole model where it lies, and no defaults of ours as if they were its own."""
        content: dict[str, Any] = told(self)
        return content if self.base.model is None else {"base": {"model": content["base"]["model"]}}

    @field_validator("projector")
    @classmethod
    def _is_one(cls, name: str) -> str:
        return projection(name).name

    @property
    def tile_pixels(self) -> int:
        """Side of one tile: the tower's input."""
        return self.s2_scales[0]

    def disagreements(self) -> Iterator[Disagreement]:
        """Scales, tiles, projector, pooling and tower fit each other; or are those of a whole model."""
        if self.base.model is not None:
            for name in sorted(self.model_fields_set - {"base"}):
                why = f"{name} is what the model of base.model has: take it out"
                if name in ("video", "max_length_tokens"):
                    why += f" (a stage changes it: train.stages.train-1.model.{name})"
                yield Disagreement(name, why)
            return
        yield from self._disagreements_of_scales()
        base, side = self.base, self.tile_pixels
        if base.vision_tower is not None:
            return
        if side % base.tower.patch_pixels:
            why = "base.tower.patch_pixels must divide the first of s2_scales"
            yield Disagreement("base.tower.patch_pixels", why, base.tower.patch_pixels)
        elif self.vision_mode not in ("s2", "dynamic_s2"):  # with S2 a frame's tokens depend on the scales as well
            tokens = projection(self.projector).side(side // base.tower.patch_pixels)
            for index, (_, rows, columns) in enumerate(self.video.pool_sizes):
                if tokens % rows or tokens % columns:
                    why = f"a pool does not divide the {tokens} x {tokens} tokens of a frame"
                    yield Disagreement(f"video.pool_sizes.{index}", why, (rows, columns))
        layers = base.tower.layers
        if not -layers - 1 <= self.select_layer <= layers:
            yield Disagreement("select_layer", f"base.tower has {layers} layers", self.select_layer)

    def _disagreements_of_scales(self) -> Iterator[Disagreement]:
        if sorted(set(self.s2_scales)) != self.s2_scales:
            yield Disagreement("s2_scales", "s2_scales must be ascending, each scale once")
            return
        if self.vision_mode not in ("s2", "dynamic_s2"):
            return
        scales = len(self.s2_scales)
        if scales < 2:
            yield Disagreement("s2_scales", f"vision_mode {self.vision_mode} needs at least two s2_scales")
        if any(scale % self.tile_pixels for scale in self.s2_scales):
            yield Disagreement("s2_scales", "each of s2_scales must be a multiple of the first")
        if not -scales <= self.s2_output_scale < scales:
            yield Disagreement("s2_output_scale", "it names no entry of s2_scales", self.s2_output_scale)
        needed = (self.s2_scales[-1] // self.tile_pixels) ** 2
        if self.vision_mode == "dynamic_s2" and self.max_tiles < needed:
            why = f"max_tiles {self.max_tiles} is less than the {needed} tiles of the last of s2_scales"
            yield Disagreement("max_tiles", why, self.max_tiles)
        single = self.vision_mode == "s2" or self.s2_output_scale % scales == 0
        if projection(self.projector).cell == 3 and not single:
            yield Disagreement(
                "projector",
                f"projector {self.projector} and vision_mode {self.vision_mode} cannot work together: "
                "S2 blocks are projected one by one and a 3x3 cell would cross or pad their borders; "
                "use mlp_downsample, s2_output_scale 0, or vision_mode s2 or dynamic",
            )
