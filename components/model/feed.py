"""From samples to batches: media are decoded and preprocessed, conversations tokenized, ahead of the model's need."""

from __future__ import annotations

import signal
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from nvila.components.contracts.errors import DataError, NvilaError
from nvila.components.data.samples import Sample
from nvila.components.data.skipped import Skipped
from nvila.components.model.batch import Batch, collate
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.positions import positions
from nvila.components.model.text.conversation import IGNORED, Encoded
from nvila.components.model.text.prompt import Prompt, make_prompt
from nvila.components.model.text.tokenizer import TokenIds
from nvila.components.model.vision.media import load_medium
from nvila.components.model.vision.preprocess import BlockSize, Kind, Medium, Visual

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


KEPT_BYTES = 256 * 2**20
"""Tiles that a process keeps: several questions share a picture, and a stage may pass over its data more than once."""


Item = tuple[Encoded, Sequence[Visual]]
"""One training sample: token ids with labels, and visuals."""


class _Kept:
    """Prompts by their media, until their tiles fill the budget."""

    def __init__(self, budget_bytes: int) -> None:
        self._left_bytes = budget_bytes
        self._prompts: dict[Hashable, Prompt] = {}

    def get(self, key: Hashable) -> Prompt | None:
        return self._prompts.get(key)

    def put(self, key: Hashable, prompt: Prompt, size_bytes: int) -> None:
        if size_bytes <= self._left_bytes:
            self._left_bytes -= size_bytes
            self._prompts[key] = prompt


@dataclass(frozen=True)
class Feed:
    """Makes model inputs of samples. Any step that reads samples reads them through this."""

    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    _kept: _Kept = field(default_factory=lambda: _Kept(KEPT_BYTES))

    def media(self, sample: Sample) -> list[Medium]:
        """The sample's media, decoded: pictures, or the frames of a video."""
        return [load_medium(path, sample.kind, self.config, sample.limits) for path in sample.paths]

    def prompt(self, sample: Sample, *, tile_all: bool = False) -> Prompt:
        """The sample's conversation and its media as tiles (uint8: the model normalises them).

        With `tile_all` each picture of several is tiled, as in training; without, each is one tile, as in inference.
        """
        key = (sample.root, sample.media, tile_all)
        prompt = self._kept.get(key)
        if prompt is None:
            prompt = make_prompt(sample.conversations, self.media(sample), self.config, tile_all=tile_all, pixels=True)
            self._kept.put(key, prompt, sum(visual.tiles.nbytes for visual in prompt.visuals))
        return replace(prompt, turns=sample.conversations)

    def item(self, sample: Sample) -> Item:
        """Token ids with labels, and visuals, of one training sample.

        Raises:
            DataError: a medium cannot be read (any more), or the length limit leaves nothing of the answer.
        """
        prompt = self.prompt(sample, tile_all=True)
        encoded = prompt.encode(self.tokenizer)
        first = next((i for i, label in enumerate(encoded.labels) if label != IGNORED), None)
        limit = self.config.max_length_tokens
        if first is None or positions(encoded.input_ids[:first], prompt.visuals, self.config, self._tokens) >= limit:
            raise DataError(f"no supervised token is left within max_length_tokens = {limit}")
        return encoded, prompt.visuals

    @cached_property
    def _tokens(self) -> TokenIds:
        return TokenIds.of(self.tokenizer, self.config.video_texts)

    def batches(self, samples: Sequence[Sample], batch: int, *, start: int = 0, workers: int = 1) -> Iterator[Batch]:
        """Consecutive batches of `samples`, the first `start` left out; `workers` processes prepare the next ones.

        Samples that cannot be used are left out of their batch, which names them; it is not filled up from the next.
        """
        from torch.utils.data import DataLoader

        order = [list(range(i, min(i + batch, len(samples)))) for i in range(start * batch, len(samples), batch)]
        loader: Any = DataLoader(
            _Items(self, samples),  # type: ignore[arg-type]
            batch_sampler=order,
            collate_fn=self._collate,
            num_workers=workers,
            worker_init_fn=_outlast_signals if workers else None,
            prefetch_factor=8 if workers else None,
        )
        for made in loader:
            if isinstance(made, NvilaError):
                raise made
            yield made.unpack()

    def _collate(self, items: list[tuple[str, Item] | Skipped | NvilaError]) -> _Packed | NvilaError:
        if error := next((item for item in items if isinstance(item, NvilaError)), None):
            return error
        good = [item for item in items if isinstance(item, tuple)]
        batch = collate([item for _, item in good], pad_id=self.tokenizer.pad_token_id)
        skipped = tuple(item for item in items if isinstance(item, Skipped))
        return _Packed.of(replace(batch, samples=tuple(name for name, _ in good), skipped=skipped))


def _outlast_signals(worker: int) -> None:
    """A stop sent to the whole process group is for the main process, which still needs batches to end its step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class _Packed:
    """A batch with all tiles in one tensor: every tensor that waits in a worker process holds file descriptors."""

    batch: Batch
    """Without visuals."""
    tiles: torch.Tensor
    visuals: list[tuple[Kind, BlockSize | None, int]]
    """Kind, block size and number of tiles of each."""

    @classmethod
    def of(cls, batch: Batch) -> _Packed:
        tiles = [visual.tiles for visual in batch.visuals]
        return cls(
            replace(batch, visuals=[]),
            torch.cat(tiles) if tiles else torch.empty(0),
            [(visual.kind, visual.block_size, len(visual.tiles)) for visual in batch.visuals],
        )

    def unpack(self) -> Batch:
        parts = self.tiles.split([count for *_, count in self.visuals]) if self.visuals else ()
        pairs = zip(self.visuals, parts, strict=True)
        return replace(self.batch, visuals=[Visual(kind, part, size) for (kind, size, _), part in pairs])


@dataclass(frozen=True)
class _Items:
    feed: Feed
    samples: Sequence[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, Item] | Skipped | NvilaError:
        """An error of ours is handed over as a value: raised in a worker process its message would be a traceback."""
        sample = self.samples[index]
        try:
            return sample.id, self.feed.item(sample)
        except DataError as error:
            return Skipped.of(sample.id, error)
        except NvilaError as error:
            return error
