"""Padding samples to a batch; the last step before the model's forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from nvila.components.model.text.conversation import IGNORED, Encoded
from nvila.components.model.vision.preprocess import Visual

if TYPE_CHECKING:
    from nvila.components.data.skipped import Skipped

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Batch:
    """What `NVILA.forward` takes: (B, L) token ids, mask and labels, and all visuals in order of appearance."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    visuals: list[Visual]
    rows: torch.Tensor | None = None
    """(B,) for the decoder the row that each sample lies in, behind those before it; None is one of its own."""
    samples: tuple[str, ...] = ()
    """Ids of the samples, row by row, where a feed made the batch; none where all of them were skipped."""
    skipped: tuple[Skipped, ...] = ()
    """Samples that were to be in the batch and cannot be used."""
    lengths: tuple[int, ...] = ()
    """Positions of each sample in the decoder, where a loader made the batch."""
    computed: int = 0
    """Positions with the padding of its rows, where a loader made the batch."""
    multiple: int = 1
    """Of what the decoder's positions are to be one."""

    @property
    def positions(self) -> int:
        """Of the samples in the decoder, where a loader made the batch."""
        return sum(self.lengths)

    def forward_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `NVILA.forward`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "visuals": self.visuals,
            "labels": self.labels,
            "rows": self.rows,
            "multiple": self.multiple,
        }

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device; tiles follow when they are encoded."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "attention_mask", "labels")}
        return replace(self, **moved, rows=None if self.rows is None else self.rows.to(device))


def collate(
    items: Sequence[tuple[Encoded, Sequence[Visual]]],
    pad_id: int,
    side: Side = "right",
    rows: Sequence[int] | None = None,
) -> Batch:
    """Pad samples to the longest; without any, one row of padding with nothing supervised.

    Args:
        items: each sample's tokens and its visuals.
        pad_id: token id under the padding; the mask hides it.
        side: where the padding goes.
        rows: for the decoder the row of each sample, ascending; None is one of its own.
    """
    if not items:
        items = [(Encoded([pad_id], [IGNORED]), [])]
    length = max(len(encoded.input_ids) for encoded, _ in items)
    # Rows are lists of numbers, which numpy takes over faster than torch.
    ids = np.full((len(items), length), pad_id, np.int64)
    labels = np.full((len(items), length), IGNORED, np.int64)
    mask = np.zeros((len(items), length), np.bool_)
    for row, (encoded, _) in enumerate(items):
        n = len(encoded.input_ids)
        span = slice(length - n, length) if side == "left" else slice(0, n)
        ids[row, span] = encoded.input_ids
        labels[row, span] = encoded.labels
        mask[row, span] = True
    lying = None if rows is None else torch.tensor(rows)
    visuals = [visual for _, visuals in items for visual in visuals]
    return Batch(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels), visuals, lying)
