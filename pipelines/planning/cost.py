"""Work of a stage in floating-point operations, and from it hours and cost. Everything assumed is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.recipe.data import DataSettings, Source
from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.contracts.recipe.train import Stage
from nvila.components.data.layouts import read
from nvila.components.data.mixture import drawn, kept
from nvila.components.model.shape import Shape
from nvila.components.model.work import operations

CHARACTERS_PER_TOKEN = 4
WINDOW = 256
"""Samples whose media pruning holds at a time (`prune/scoring.py`)."""
TEXT_TOKENS = 128
"""Of a sample whose annotation file is not here."""
SOME = 1000
"""Samples whose texts stand for those of all."""
FORMULA = """\
floating-point operations, n parameters in a part's matrices, t its tokens:
  forward      2 n t, and attention 4 t width (tokens it sees: all in the tower, half in the decoder) a block
  backward     4 n t where the part learns in full, 2 n t where gradients pass through (its adapters or layer norms
               learn, or what is before it), of attention twice the forward's in both, none where nothing learns so
               far; adapters are matrices that learn
  hours        operations / (GPUs x peak x MFU), recomputation not counted in the MFU; cost is hours x GPUs x price
  FP8          Linears that it takes at the peak of FP8, all else at that of bf16: what it saves at most"""


@dataclass(frozen=True)
class Subset:
    """`source.split`: its size and the text of a sample."""

    samples: int
    text_tokens: float
    kind: str
    texts: tuple[float, ...] = (TEXT_TOKENS,)
    """Tokens of text of some of them."""
    looks: int | None = None
    """Media that a tower sees, each once among `WINDOW` samples, which are held together; None: as many as samples."""

    @property
    def media(self) -> int:
        """Pictures or clips to look at, at most."""
        return self.samples if self.looks is None else self.looks


def subsets(data: DataSettings, given: Mapping[str, int]) -> dict[str, Subset]:
    """What is known of the training data: from annotation files that are here, and from `--samples`.

    Raises:
        ConfigError: `--samples` names no subset of the recipe.
    """
    known = {f"{source.name}.{split}": source for source in data.sources for split in ("sft", "captions")}
    for name in given:
        if name not in known:
            raise ConfigError("no such subset", where="--samples", value=name, do=f"There are {', '.join(known)}.")
    found: dict[str, Subset] = {}
    for name, source in known.items():
        file = source.annotation(name.partition(".")[2])
        if name in given:
            found[name] = Subset(given[name], TEXT_TOKENS, source.kind)
        elif file.is_file():
            found[name] = _read(file, source)
    return found


def samples_of(stage: Stage, known: Mapping[str, Subset], prune: PruneSettings) -> dict[str, int] | None:
    """Samples that a stage draws of each subset, of what is pruned as many as the ratio says; None where one is not
    known."""
    found = {}
    for name, passes in stage.data.items():
        if name not in known:
            return None
        source, _, split = name.partition(".")
        size = known[name].samples
        if stage.pruned and split == "sft" and prune.method != "none":
            size = kept(prune.keep_ratio_of.get(source, prune.keep_ratio), size)
        found[name] = drawn(passes, size)
    return found


def stage_work(
    shape: Shape, stage: Stage, drawn: Mapping[str, int], known: Mapping[str, Subset]
) -> tuple[float, float]:
    """Operations and decoder tokens of a whole stage."""
    length = min(stage.max_length_tokens, shape.config.max_length_tokens)
    work = tokens = 0.0
    for name, samples in drawn.items():
        subset = known[name]
        seen = shape.video if subset.kind == "video" else shape.image
        work += samples * operations(shape, stage, seen.load(subset.text_tokens, length))
        tokens += samples * min(seen.tokens + subset.text_tokens, length)
    return work, tokens


def _read(file: Path, source: Source) -> Subset:
    records: list[Any] = []
    try:
        records = read(file, source.layout)
        texts = [[turn["value"] for turn in record["conversations"]] for record in records]
    except (DataError, KeyError, TypeError):
        texts = []  # spoilt records are for `validate`; their number is known all the same where the file can be read
    sizes = [sum(len(text) for text in one if isinstance(text, str)) / CHARACTERS_PER_TOKEN for one in texts]
    media = [str(record.get(source.kind)) if isinstance(record, dict) else "" for record in records]
    looks = sum(len(set(media[first : first + WINDOW])) for first in range(0, len(media), WINDOW))
    some = tuple(sizes[:: max(1, -(-len(sizes) // SOME))]) or (0.0,)
    return Subset(len(records), sum(sizes) / max(len(records), 1), source.kind, some, looks)
