"""Recipe section `data`: the sources and what validation accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from nvila.components.contracts.places import INSTEAD, is_address
from nvila.components.contracts.recipe.section import Section

SPLITS = ("sft", "captions", "heldout")
"""Annotation files of a source: `sft` (questions and answers for stages 4 and 5), `captions` (image-text pairs for
stages 1 to 3), `heldout` (never trained on). A source has those that the recipe's stages and evaluation draw."""
LABELS = "labels"
"""Optional, for `initialize`."""
Layout = Literal["llava"]
SUFFIXES: dict[Layout, tuple[str, ...]] = {"llava": (".json", ".jsonl")}
"""Of the annotation files of each layout, any of which will do. How their records are read is `data/layouts.py`'s."""


class Source(Section):
    """A folder with annotation files and the media that they name."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    kind: Literal["image", "video"]
    path: str
    """Folder with `sft.json`, `captions.json` and `heldout.json`, as far as the recipe draws them, optionally
    `labels.json`, and the media that they name."""
    layout: Layout = "llava"
    """How conversations lie in the annotation files: `llava` is a JSON list or JSON lines in LLaVA's form."""
    demo: Literal["shapes", "digits", "clips"] | None = None
    """Build this demonstration source at `path` first when it is not there."""
    demo_scale: float = Field(default=1.0, gt=0, le=1)
    """Share of the full demonstration source to build (the micro recipe takes a few)."""

    @field_validator("path")
    @classmethod
    def _is_local(cls, value: str) -> str:
        if is_address(value):
            raise ValueError(f"not a path on this machine. {INSTEAD}")
        return value

    @model_validator(mode="after")
    def _demonstrations_are_llava(self) -> Source:
        if self.demo and self.layout != "llava":
            raise ValueError(f"a demonstration source is written as llava, not as {self.layout}")
        return self

    def layout_of(self, name: str) -> Layout:
        """Of the annotation file `name`: labels have one layout, whatever that of the conversations."""
        return "llava" if name == LABELS else self.layout

    def annotation(self, name: str) -> Path:
        """The annotation file `name` (a split, or the labels): the one that is there, else by its first suffix."""
        paths = [Path(self.path, name + suffix) for suffix in SUFFIXES[self.layout_of(name)]]
        return next((path for path in paths if path.is_file()), paths[0])

    def annotations(self) -> dict[str, Path]:
        """The annotation files that are there, by name, each with its absolute path."""
        found = {name: self.annotation(name).absolute() for name in (*SPLITS, LABELS)}
        return {name: path for name, path in found.items() if path.is_file()}


class Validation(Section):
    """Limits a record must keep; a record that breaks one is quarantined with the reason.

    What the media may be goes with the tables of good records to every step that decodes them.
    """

    min_side_pixels: int = Field(default=8, ge=0)
    max_pixels: int = Field(default=50_000_000, gt=0, lt=2**31)
    """Decoders count pixels in 32 bits."""
    max_media_bytes: int = Field(default=512 * 2**20, gt=0)
    max_video_seconds: float = Field(default=3600.0, gt=0)
    max_video_frames: int = Field(default=200_000, gt=0)
    max_text_chars: int = Field(default=32_768, gt=0)
    max_quarantined_share: float = Field(default=0.05, ge=0, le=1)
    """More spoilt records than this share of a source, rounded up, stop the run: something is systematically wrong."""
    min_source_share: float = Field(default=0.01, ge=0, le=1)
    """Each source must hold at least this share of all SFT records."""


class DataSettings(Section):
    """All sources and the limits."""

    sources: list[Source] = Field(min_length=1)
    validation: Validation = Validation()

    @property
    def images(self) -> list[str]:
        """Names of the sources of pictures."""
        return [source.name for source in self.sources if source.kind == "image"]

    @property
    def videos(self) -> list[str]:
        """Names of the sources of clips."""
        return [source.name for source in self.sources if source.kind == "video"]
