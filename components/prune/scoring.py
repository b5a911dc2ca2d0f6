"""Losses of answers under several reference models at once: each medium is decoded once, and seen once by a tower that
several of them share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch.nn import functional as F

from nvila.components.contracts.errors import DataError
from nvila.components.data.samples import Sample
from nvila.components.data.skipped import Skipped
from nvila.components.model.batch import Batch, collate
from nvila.components.model.feed import Feed, Item
from nvila.components.model.nvila import NVILA
from nvila.components.model.positions import positions
from nvila.components.model.text.tokenizer import TokenIds
from nvila.components.model.vision.preprocess import Visual, blank, normalise
from nvila.components.prune.decide import BLANK
from nvila.components.serve.batch import Score

WINDOW = 256
"""Samples whose media are in memory together; within them batches are of like length."""
POSITIONS_AT_ONCE = 16384
"""Of a padded batch: enough to keep a GPU busy, few enough for its memory beside a large model."""
PATCHES_AT_ONCE = 65536
"""Of one tower call."""


@dataclass
class Scored:
    """What was found of some samples."""

    losses: dict[str, dict[str, Score]] = field(default_factory=dict)
    """By name of the model, by sample id; a skipped sample has none."""
    skipped: list[Skipped] = field(default_factory=list)


class Panel:
    """Models that score the same samples.

    Models that see alike (equal towers, the same preparation of media, one tokenizer) share media, features and tokens.
    """

    def __init__(self, models: Mapping[str, tuple[NVILA, Any]]) -> None:
        """`models` are model and tokenizer by name."""
        self._sights: list[_Sight] = []
        for name, (model, tokenizer) in models.items():
            model.eval()
            for sight in self._sights:
                if sight.shared_by(model, tokenizer):
                    sight.models[name] = model
                    break
            else:
                self._sights.append(_Sight(Feed(tokenizer, model.config), {name: model}))

    def score(self, samples: Iterable[Sample], blind: str | None = None) -> Iterator[Scored]:
        """Losses of each sample's answers, window by window.

        Args:
            samples: in any order; those about one picture best follow each other.
            blind: name of the model that is asked without the picture as well; its losses are called `BLANK`.
        """
        left = iter(samples)
        while window := list(islice(left, WINDOW)):
            found = Scored()
            for sight in self._sights:
                sight.score(window, found, blind)
            yield found


@dataclass
class _Sight:
    feed: Feed
    models: dict[str, NVILA]
    blanks: dict[torch.Size, torch.Tensor] = field(default_factory=dict)
    """Features of an empty tile, by its shape."""

    @property
    def first(self) -> NVILA:
        return next(iter(self.models.values()))

    def shared_by(self, model: NVILA, tokenizer: Any) -> bool:
        own = self.feed.tokenizer
        return (
            replace(self.first.config, llm={}) == replace(model.config, llm={})
            and (own is tokenizer or own.get_vocab() == tokenizer.get_vocab())
            and own.chat_template == tokenizer.chat_template
            and same_weights(self.first.vision_tower, model.vision_tower)
        )

    def score(self, samples: Sequence[Sample], found: Scored, blind: str | None) -> None:
        good: list[tuple[Sample, Item]] = []
        for sample in samples:
            try:
                good.append((sample, self.feed.item(sample)))
            except DataError as error:
                found.skipped.append(Skipped.of(sample.id, error))
        self._look(good)
        for some in self._batches(good):
            ids, items = [sample.id for sample, _ in some], [item for _, item in some]
            batch = collate(items, TokenIds.of(self.feed.tokenizer, self.feed.config.video_texts).pad)
            for name, model in self.models.items():
                self._add(found, name, ids, answer_losses(model, batch))
            if blind in self.models:
                hidden = replace(batch, visuals=[self._blank(visual) for visual in batch.visuals])
                self._add(found, BLANK, ids, answer_losses(self.models[blind], hidden))

    def _look(self, good: list[tuple[Sample, Item]]) -> None:
        """Give the visuals their features, each picture or clip once."""
        media = {(sample.root, sample.media): item[1] for sample, item in good}
        seen = dict(zip(media, look(self.first, list(media.values())), strict=True))
        for index, (sample, (encoded, _)) in enumerate(good):
            good[index] = (sample, (encoded, seen[sample.root, sample.media]))

    def _batches(self, good: list[tuple[Sample, Item]]) -> Iterator[list[tuple[Sample, Item]]]:
        """Batches of like length, the longest first, of at most `POSITIONS_AT_ONCE` with their padding."""
        config, tokens = self.feed.config, TokenIds.of(self.feed.tokenizer, self.feed.config.video_texts)
        lengths = {
            sample.id: positions(encoded.input_ids, visuals, config, tokens) for sample, (encoded, visuals) in good
        }
        batch: list[tuple[Sample, Item]] = []
        for one in sorted(good, key=lambda one: -lengths[one[0].id]):
            if batch and (len(batch) + 1) * lengths[batch[0][0].id] > POSITIONS_AT_ONCE:
                yield batch
                batch = []
            batch.append(one)
        if batch:
            yield batch

    def _blank(self, visual: Visual) -> Visual:
        hidden, shape = blank(visual), visual.tiles.shape[1:]
        if shape not in self.blanks:
            ((seen,),) = look(self.first, [[replace(hidden, tiles=hidden.tiles[:1])]])
            assert seen.features is not None
            self.blanks[shape] = seen.features
        return replace(hidden, features=self.blanks[shape].expand(len(visual.tiles), -1, -1))

    @staticmethod
    def _add(found: Scored, name: str, ids: list[str], losses: list[Score]) -> None:
        known = found.losses.setdefault(name, {})
        for sample, loss in zip(ids, losses, strict=True):
            if math.isfinite(loss.nats) and loss.tokens:
                known[sample] = loss
            else:
                found.skipped.append(Skipped(sample, "the loss of its answer is not finite"))


@torch.no_grad()
def answer_losses(model: NVILA, batch: Batch) -> list[Score]:
    """Of each row, in order, what the model makes of its supervised tokens (cross-entropy in float32)."""
    batch = batch.to(model.device)
    spliced = model.prepare(batch.input_ids, batch.attention_mask, batch.visuals, batch.labels)
    assert spliced.labels_BT is not None
    logits, targets, rows = model.predictions(model.hidden_states(spliced), spliced.labels_BT)
    nothing = torch.zeros(len(batch.input_ids), device=logits.device)
    sums = nothing.index_add(0, rows, F.cross_entropy(logits, targets, reduction="none"))
    wrong = nothing.index_add(0, rows, (logits.argmax(-1) != targets).float())
    counts = torch.bincount(rows, minlength=len(batch.input_ids))
    return [Score(*one) for one in zip(sums.tolist(), counts.tolist(), (wrong == 0).tolist(), strict=True)]


@torch.no_grad()
def look(model: NVILA, media: Sequence[Sequence[Visual]]) -> list[list[Visual]]:
    """The visuals with the features that the model's tower has of them; pixels are let go."""
    visuals = [visual for some in media for visual in some]
    if not visuals:
        return [[] for _ in media]
    tiles = torch.cat([visual.tiles for visual in visuals])
    weight = next(model.vision_tower.parameters())
    together = max(1, PATCHES_AT_ONCE // (model.config.tile_pixels // int(model.config.vision["patch_size"])) ** 2)
    parts = [model.features(normalise(part.to(weight.device)).to(weight.dtype)) for part in tiles.split(together)]
    features = torch.cat(parts).split([len(visual.tiles) for visual in visuals])
    seen = iter(replace(visual, features=own) for visual, own in zip(visuals, features, strict=True))
    return [[next(seen) for _ in some] for some in media]


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules have the same tensors under the same names."""
    if one is other:
        return True
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
