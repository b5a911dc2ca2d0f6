"""From samples to batches: media are decoded and preprocessed, conversations tokenized, ahead of the model's need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nvila.components.data.media import Limits, load_image, load_video_frames
from nvila.components.data.samples import Sample
from nvila.components.model.batch import Batch, collate
from nvila.components.model.config import ModelConfig
from nvila.components.model.conversation import Encoded, encode
from nvila.components.model.preprocess import Visual, preprocess_image, preprocess_video

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Feed:
    """Makes model inputs of samples. Any step that reads samples reads them through this."""

    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    limits: Limits = field(default_factory=Limits)

    def visuals(self, sample: Sample) -> list[Visual]:
        """The sample's media, decoded and preprocessed."""
        if sample.kind == "video":
            return [
                preprocess_video(load_video_frames(path, self.config.num_video_frames, self.limits), self.config)
                for path in sample.paths
            ]
        alone = len(sample.media) == 1
        return [
            visual
            for path in sample.paths
            for visual in preprocess_image(load_image(path, self.limits), self.config, alone=alone)
        ]

    def item(self, sample: Sample) -> tuple[Encoded, list[Visual]]:
        """Token ids with labels, and visuals, of one training sample."""
        return encode(self.tokenizer, sample.conversations), self.visuals(sample)

    def batches(self, samples: Sequence[Sample], batch: int, *, start: int = 0, workers: int = 1) -> Iterator[Batch]:
        """Consecutive batches of `samples`, the first `start` left out; a process prepares the next ones meanwhile.

        A last batch that is not full is dropped only where it would be the only reason for another shape: it is kept.
        """
        from torch.utils.data import DataLoader

        order = [list(range(i, min(i + batch, len(samples)))) for i in range(start * batch, len(samples), batch)]
        loader: Any = DataLoader(
            _Items(self, samples),  # type: ignore[arg-type]
            batch_sampler=order,
            collate_fn=self._collate,
            num_workers=workers,
            prefetch_factor=8 if workers else None,
        )
        yield from loader

    def _collate(self, items: list[tuple[Encoded, list[Visual]]]) -> Batch:
        return collate(items, pad_id=self.tokenizer.pad_token_id)


@dataclass(frozen=True)
class _Items:
    feed: Feed
    samples: Sequence[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Encoded, list[Visual]]:
        return self.feed.item(self.samples[index])
