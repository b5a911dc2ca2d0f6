"""Recipe section `data`: the sources and what validation accepts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from nvila.components.contracts.places import INSTEAD, is_address
from nvila.components.contracts.recipe.section import (
    MOST_CHARACTERS,
    MOST_ENTRIES,
    Disagreement,
    Folder,
    Section,
    Share,
)

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

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=MOST_CHARACTERS)
    """What stages, tasks and reports call it."""
    kind: Literal["image", "video"]
    """Whether its media are pictures or clips."""
    path: Folder
    """Folder with `sft.json`, `captions.json` and `heldout.json`, as far as the recipe draws them, optionally
    `labels.json`, and the media that they name."""
    layout: Layout = "llava"
    """How conversations lie in the annotation files: `llava` is a JSON list or JSON lines in LLaVA's form."""
    demo: Literal["shapes", "digits", "clips"] | None = None
    """Build this demonstration source at `path` first when it is not there."""
    demo_scale: float = Field(default=1.0, ge=0.001, le=1)
    """Share of the full demonstration source to build (the micro recipe takes a few)."""

    @field_validator("path")
    @classmethod
    def _is_local(cls, value: str) -> str:
        if is_address(value):
            raise ValueError(f"not a path on this machine. {INSTEAD}")
        return value

    def disagreements(self) -> Iterator[Disagreement]:
        """A demonstration is written in one layout."""
        if self.demo and self.layout != "llava":
            yield Disagreement("layout", f"a demonstration source is written as llava, not as {self.layout}")

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

    min_side_pixels: int = Field(default=8, ge=0, le=10_000)
    """Shortest side of a picture or frame."""
    max_pixels: int = Field(default=50_000_000, ge=1, lt=2**31)
    """Of a picture or frame. Decoders count pixels in 32 bits."""
    max_media_bytes: int = Field(default=512 * 2**20, ge=1, le=2**40)
    """Of a medium's file."""
    max_video_seconds: float = Field(default=3600.0, ge=0.01, le=7 * 86_400)
    """Length of a clip; a week at most, since every clip is read to its end."""
    max_video_frames: int = Field(default=200_000, ge=1, le=10**8)
    """Frames of a clip."""
    max_text_chars: int = Field(default=32_768, ge=1, le=10**7)
    """Of all turns of a record."""
    max_quarantined_share: Share = 0.05
    """More spoilt records than this share of a source, rounded up, stop the run: something is systematically wrong."""
    min_source_share: Share = 0.01
    """Each source must hold at least this share of all SFT records."""

    def disagreements(self) -> Iterator[Disagreement]:
        """The smallest picture must be allowed."""
        least = self.min_side_pixels**2
        if least > self.max_pixels:
            yield Disagreement(
                "max_pixels",
                f"no picture has sides of {self.min_side_pixels} pixels (min_side_pixels) and so few pixels",
                self.max_pixels,
            )


class DataSettings(Section):
    """All sources and the limits."""

    sources: list[Source] = Field(min_length=1, max_length=MOST_ENTRIES)
    """What is trained and measured on; a layer over it changes single ones by their names."""
    validation: Validation = Validation()
    """What records must keep."""

    @property
    def images(self) -> list[str]:
        """Names of the sources of pictures."""
        return [source.name for source in self.sources if source.kind == "image"]

    @property
    def videos(self) -> list[str]:
        """Names of the sources of clips."""
        return [source.name for source in self.sources if source.kind == "video"]

    def disagreements(self) -> Iterator[Disagreement]:
        """Names tell sources apart, and all of them can hold their share."""
        names = [source.name for source in self.sources]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield Disagreement(f"sources.{index}.name", "two sources share a name", name)
        if len(names) * self.validation.min_source_share > 1:
            why = f"{len(names)} sources cannot each hold so much of the records"
            yield Disagreement("validation.min_source_share", why, self.validation.min_source_share)
