"""Putting visual embeddings in the place of media tokens (`_embed` in `llava/model/llava_arch.py`).

Padding is dropped before anything is indexed, so left- and right-padded input give the same sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nvila.components.contracts.errors import DataError
from nvila.components.model.text.conversation import IGNORED


@dataclass(frozen=True)
class Spliced:
    """The decoder's input. B rows, T positions, H channels."""

    embeds_BTH: torch.Tensor
    attention_mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    labels_BT: torch.Tensor | None


def splice(
    embed_tokens: Callable[[torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor | None,
    media: Mapping[int, Sequence[torch.Tensor]],
    *,
    max_length: int | None = None,
    side: Literal["left", "right"] = "right",
) -> Spliced:
    """Replace each media token by the next embedding sequence of its type, in order of appearance across the batch.

    Args:
        embed_tokens: (n,) token ids to (n, H); it never sees a media token.
        input_ids: (B, L), padded on either side.
        attention_mask: (B, L), zero on padding.
        labels: (B, L) with -100 where unsupervised, or None.
        media: embedding sequences (n_i, H) by media token id.
        max_length: cut each row after so many positions; None cuts nothing.
        side: where the result is padded, with zero embeddings.

    Raises:
        DataError: more or fewer embedding sequences than media tokens.
    """
    device, rows = input_ids.device, len(input_ids)
    keep = attention_mask.bool()
    ids = input_ids[keep]
    row = torch.arange(rows, device=device)[:, None].expand_as(keep)[keep]
    lengths, source, table = _sources(embed_tokens, ids, media)

    # Every kept token becomes `lengths` positions; expand row, source and label accordingly.
    token = torch.repeat_interleave(torch.arange(len(ids), device=device), lengths)
    within = torch.arange(len(token), device=device) - (lengths.cumsum(0) - lengths)[token]
    row = row[token]
    per_row = torch.bincount(row, minlength=rows)
    position = torch.arange(len(token), device=device) - (per_row.cumsum(0) - per_row)[row]
    kept = position < max_length if max_length is not None else torch.ones_like(position, dtype=torch.bool)
    token, within, row, position = token[kept], within[kept], row[kept], position[kept]
    per_row = torch.bincount(row, minlength=rows)

    width = int(per_row.max())
    column = position + (width - per_row)[row] if side == "left" else position
    place = row * width + column
    embeds = table.new_zeros(rows * width, table.shape[-1]).index_copy(0, place, table[source[token] + within])
    mask = torch.zeros(rows * width, dtype=torch.bool, device=device).index_fill(0, place, True)
    positions = torch.zeros(rows * width, dtype=torch.long, device=device).index_copy(0, place, position)
    spliced_labels = None
    if labels is not None:
        is_media = torch.isin(ids, torch.tensor(list(media), device=device, dtype=ids.dtype))
        token_labels = labels[keep].masked_fill(is_media, IGNORED)
        spliced_labels = labels.new_full((rows * width,), IGNORED).index_copy(0, place, token_labels[token])
        spliced_labels = spliced_labels.view(rows, width)
    return Spliced(embeds.view(rows, width, -1), mask.view(rows, width), positions.view(rows, width), spliced_labels)


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
