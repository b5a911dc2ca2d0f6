"""Putting visual embeddings in the place of media tokens (`_embed` in `llava/model/llava_arch.py`).

Padding is dropped before anything is indexed, so left- and right-padded input give the same sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nvila.components.contracts.errors import DataError
from nvila.components.model.positions import padded
from nvila.components.model.text.conversation import IGNORED


@dataclass(frozen=True)
class Spliced:
    """The decoder's input. B rows, T positions, H channels."""

    embeds_BTH: torch.Tensor
    attention_mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    labels_BT: torch.Tensor | None
    lengths_S: torch.Tensor | None = None
    """Positions of each sample, where rows hold several, of one row its padding's too; None where a row is a sample."""


def splice(
    embed_tokens: Callable[[torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor | None,
    media: Mapping[int, Sequence[torch.Tensor]],
    *,
    max_length: int | None = None,
    side: Literal["left", "right"] = "right",
    rows: torch.Tensor | None = None,
    multiple: int = 1,
) -> Spliced:
    """Replace each media token by the next embedding sequence of its type, in order of appearance across the batch.

    Args:
        embed_tokens: (n,) token ids to (n, H); it never sees a media token.
        input_ids: (S, L), a sample each, padded on either side.
        attention_mask: (S, L), zero on padding.
        labels: (S, L) with -100 where unsupervised, or None.
        media: embedding sequences (n_i, H) by media token id.
        max_length: cut each sample after so many positions; None cuts nothing.
        side: where the result is padded, with zero embeddings.
        rows: (S,) ascending, the row of the result that each sample lies in, behind those before it; positions begin
            anew with each, and its first label is masked: nothing before it predicts it. None is a row of its own.
        multiple: of what the positions of all rows together are one; products in FP8 want that.

    Raises:
        DataError: more or fewer embedding sequences than media tokens.
    """
    device, samples = input_ids.device, len(input_ids)
    keep = attention_mask.bool()
    ids = input_ids[keep]
    sample = torch.arange(samples, device=device)[:, None].expand_as(keep)[keep]
    lengths, source, table = _sources(embed_tokens, ids, media)

    # Every kept token becomes `lengths` positions; expand sample, source and label accordingly.
    token = torch.repeat_interleave(torch.arange(len(ids), device=device), lengths)
    within = torch.arange(len(token), device=device) - (lengths.cumsum(0) - lengths)[token]
    sample = sample[token]
    per_sample = torch.bincount(sample, minlength=samples)
    position = torch.arange(len(token), device=device) - (per_sample.cumsum(0) - per_sample)[sample]
    kept = position < max_length if max_length is not None else torch.ones_like(position, dtype=torch.bool)
    token, within, sample, position = token[kept], within[kept], sample[kept], position[kept]
    per_sample = torch.bincount(sample, minlength=samples)

    row_of = torch.arange(samples, device=device) if rows is None else rows
    before = per_sample.cumsum(0) - per_sample
    before = before - before[torch.searchsorted(row_of, row_of)]  # in the same row
    count = samples if rows is None else int(rows[-1]) + 1
    per_row = per_sample.new_zeros(count).index_add(0, row_of, per_sample)
    longest = int(per_row.max())
    width = padded(longest, count, multiple)
    column = position + before[sample] + ((width - per_row)[row_of[sample]] if side == "left" else 0)
    place = row_of[sample] * width + column
    embeds = table.new_zeros(count * width, table.shape[-1]).index_copy(0, place, table[source[token] + within])
    mask = torch.zeros(count * width, dtype=torch.bool, device=device).index_fill(0, place, True)
    positions = torch.zeros(count * width, dtype=torch.long, device=device).index_copy(0, place, position)
    spliced_labels = None
    if labels is not None:
        is_media = torch.isin(ids, torch.tensor(list(media), device=device, dtype=ids.dtype))
        token_labels = labels[keep].masked_fill(is_media, IGNORED)
        own = token_labels[token]
        if rows is not None:
            own = own.masked_fill(position == 0, IGNORED)
        spliced_labels = labels.new_full((count * width,), IGNORED).index_copy(0, place, own).view(count, width)
    shaped = (embeds.view(count, width, -1), mask.view(count, width), positions.view(count, width))
    if rows is not None and count == 1 and width > longest:
        # To a kernel that knows samples by their lengths the padding is one: what it left out would not be finite.
        per_sample = torch.cat([per_sample, per_sample.new_tensor([width - longest])])
    return Spliced(*shaped, spliced_labels, None if rows is None else per_sample)


def _sources(
    embed_tokens: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, media: Mapping[int, Sequence[torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where each token's embeddings lie.

    Returns:
        lengths (n,): positions each token becomes; source (n,): its first row in the table; table: all embeddings,
        the text's first, then the media's.
    """
    lengths = torch.ones_like(ids)
    source = torch.zeros_like(ids)
    is_text = torch.ones_like(ids, dtype=torch.bool)
    parts: list[torch.Tensor] = []
    found = {marker: (ids == marker).nonzero().flatten() for marker in media}
    for where in found.values():
        is_text[where] = False
    text = embed_tokens(ids[is_text])
    source[is_text] = torch.arange(len(text), device=ids.device)
    start = len(text)
    for marker, sequences in media.items():
        where = found[marker]
        if len(where) != len(sequences):
            raise DataError(
                f"{len(where)} media tokens but {len(sequences)} media",
                where=f"media token {marker}",
                do="Check that each sample's media match its markers",
            )
        sizes = torch.tensor([len(sequence) for sequence in sequences], device=ids.device, dtype=ids.dtype)
        lengths[where] = sizes
        source[where] = start + sizes.cumsum(0) - sizes
        start += int(sizes.sum())
        parts += [sequence.to(text.dtype) for sequence in sequences]
    return lengths, source, torch.cat([text, *parts])
