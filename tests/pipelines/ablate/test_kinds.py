"""Kinds of held-out questions."""

from pathlib import Path

import pytest

from nvila.components.data.samples import Sample, Turn
from nvila.pipelines.ablate.kinds import kind_of


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("Is there a red shape?", "Yes.", "yes/no"),
        ("What is the color of the circle?", "teal", "color"),
        ("What colour is it?", "teal", "color"),
        ("What is the red shape?", "circle", "shape"),
        ("Which digit is in row 1, column 2?", "7", "number"),
        ("What does the sign say?", "no parking", "other"),
    ],
)
def test_kind(question: str, answer: str, kind: str) -> None:
    """A method that teaches colours and loses yes and no must not look even in the mean of both."""
    turns = (Turn("human", f"<image>\n{question}"), Turn("gpt", answer))
    sample = Sample("s/heldout/1", "s", "image", "heldout", Path("/"), ("a.png",), turns, question, answer)
    assert kind_of(sample) == kind
