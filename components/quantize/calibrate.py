"""Calibration data: a few training samples of every source, as tiles for the tower and embeddings for the decoder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nvila.components.contracts.errors import QuantizationError

if TYPE_CHECKING:
    from nvila.components.data.samples import Sample
    from nvila.components.model.batch import Batch
    from nvila.components.model.nvila import NVILA


def choose_samples(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` samples taken in turn from each source, the order within a source shuffled by `seed`.

    Raises:
        QuantizationError: there is no training sample.
    """
    if not samples:
        raise QuantizationError("no training samples to calibrate with", where="quantize.calibration_samples")
    by_source: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda s: s.id):
        by_source.setdefault(sample.source, []).append(sample)
    for source in sorted(by_source):
        random.Random(f"{seed} {source}").shuffle(by_source[source])
    chosen: list[Sample] = []
    for turn in range(max(len(each) for each in by_source.values())):
        chosen += [by_source[source][turn] for source in sorted(by_source) if turn < len(by_source[source])]
        if len(chosen) >= count:
            break
    return chosen[:count]


def tower_batches(batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The tower's input of each batch: (T, 3, S, S) normalised tiles; text-only batches give none."""
    from nvila.components.model.vision.preprocess import normalise

    return [normalise(torch.cat([v.tiles for v in batch.visuals])) for batch in batches if batch.visuals]


@torch.no_grad()
def decoder_batches(model: NVILA, batches: Sequence[Batch]) -> list[dict[str, torch.Tensor]]:
    """The decoder's input of each batch of one sample: its spliced embeddings, without padding."""
    found = []
    for batch in batches:
        spliced = model.prepare(batch.input_ids, batch.attention_mask, batch.visuals)
        kept = spliced.attention_mask_BT[0]
        found.append(
            {
                "inputs_embeds": spliced.embeds_BTH[:, kept],
                "attention_mask": kept[kept][None].long(),
            }
        )
    return found
