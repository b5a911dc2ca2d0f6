"""From samples to batches: media are decoded and preprocessed, conversations tokenized."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from nvila.components.contracts.errors import DataError
from nvila.components.data.samples import Sample
from nvila.components.data.skipped import Skipped
from nvila.components.model.batch import Batch, collate
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.positions import positions
from nvila.components.model.text.conversation import IGNORED, Encoded
from nvila.components.model.text.prompt import Prompt, make_prompt
from nvila.components.model.text.tokenizer import TokenIds
from nvila.components.model.vision.media import load_medium
from nvila.components.model.vision.preprocess import Medium, Visual

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

    def batches(self, samples: Sequence[Sample], batch: int) -> Iterator[Batch]:
        """Consecutive batches of `samples`."""
        for first in range(0, len(samples), batch):
            yield self.batch(samples[first : first + batch])

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """One batch. Samples that cannot be used are left out of it, and it names them."""
        good, skipped = self.items(samples)
        batch = collate([item for _, item in good], pad_id=self.tokenizer.pad_token_id)
        return replace(batch, samples=tuple(name for name, _ in good), skipped=tuple(skipped))

    def items(self, samples: Sequence[Sample]) -> tuple[list[tuple[str, Item]], list[Skipped]]:
        """What can be used of the samples, by their ids, and what cannot."""
        good: list[tuple[str, Item]] = []
        skipped: list[Skipped] = []
        for sample in samples:
            try:
                good.append((sample.id, self.item(sample)))
            except DataError as error:
                skipped.append(Skipped.of(sample.id, error))
        return good, skipped

    def length(self, item: Item) -> int:
        """Positions of a training sample in the decoder."""
        encoded, visuals = item
        whole = positions(encoded.input_ids, visuals, self.config, self._tokens)
        return min(whole, self.config.max_length_tokens)
