"""How long a row of tokens is for the decoder, known before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nvila.components.model.config.config import ModelConfig
from nvila.components.model.text.tokenizer import TokenIds
from nvila.components.model.vision.preprocess import Visual
from nvila.components.model.vision.visual import token_count


def positions(ids: Sequence[int], visuals: Sequence[Visual], config: ModelConfig, tokens: TokenIds) -> int:
    """Positions of `ids` once embeddings stand for its media tokens.

    Args:
        ids: the tokens of one row, or the first of them.
        visuals: of the row, in order of appearance.
        config: the architecture.
        tokens: of the tokenizer that made `ids`.
    """
    start, end, sep = tokens.video_marks if tokens.video_marks is not None else ((), (0,), ())
    marks = (len(start), len(end), len(sep))
    waiting = {
        token: iter([visual for visual in visuals if visual.kind == kind])
        for token, kind in ((tokens.image, "image"), (tokens.video, "video"))
    }
    shown = [next(waiting[token], None) for token in ids if token in waiting]
    return len(ids) + sum(
        token_count(visual.kind, visual.block_size, len(visual.tiles), config, marks) - 1 for visual in shown if visual
    )


def padded(width: int, rows: int, multiple: int) -> int:
    """The least width of so many rows that is no less than this one and makes their positions a multiple together."""
    step = multiple // math.gcd(multiple, rows)
    return -(-width // step) * step
