"""Kinds of held-out questions, by which the table tells what a subset has taught."""

from __future__ import annotations

import re

from nvila.components.data.samples import Sample
from nvila.components.metrics.accuracy import normal_form

_KINDS = (
    (r"(yes|no)", "yes/no"),
    (r"[+-]?\d+([.,]\d+)?", "number"),
)
_ABOUT = re.compile(r"\b(colou?r|shape|digit|number|size|time|where|who|when|why|how many)\b", re.IGNORECASE)


def kind_of(sample: Sample) -> str:
    """By the answer: yes/no, number, or else what the question asks about, as far as a word of it tells."""
    answer = normal_form(sample.answer)
    for pattern, kind in _KINDS:
        if re.fullmatch(pattern, answer):
            return kind
    asked = _ABOUT.search(sample.question)
    return asked[0].lower().replace("colour", "color") if asked else "other"
