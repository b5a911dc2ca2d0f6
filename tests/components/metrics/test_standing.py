from __future__ import annotations

import pytest
from telling import evaluation, quantized_evaluation, retained, scored

from nvila.components.contracts.results.accuracy import Retained, Scored
from nvila.components.metrics.standing import headline, standing


@pytest.mark.parametrize(
    ("full", "quantized", "said"),
    [
        (scored(0.8), retained(0.8, full=0.8), "learnt"),
        (scored(0.8), retained(0.77, full=0.8), "learnt"),
        (scored(0.8), retained(0.95, full=0.8), "learnt"),
        (scored(0.8), retained(0.3, full=0.8), "lost by quantization"),
        (scored(0.8), retained(0.76, full=0.8), "lost by quantization"),
        (scored(0.8), retained(0.75, full=0.76), "learnt"),
        (scored(0.8), None, "not measured after quantization"),
        (scored(0.35), retained(0.33, full=0.35), "not above its baseline after quantization"),
        (scored(0.33), retained(0.9, full=0.33), "not above its baseline"),
        (scored(0.1), retained(0.1, full=0.1), "not above its baseline"),
    ],
)
def test_each_source_has_one_standing(full: Scored, quantized: Retained | None, said: str) -> None:
    """A model that guesses, or that quantization broke, must not be called good anywhere."""
    assert standing(full, quantized) == said


def test_one_bad_source_spoils_the_headline() -> None:
    """An average would hide it."""
    full = evaluation({"a": scored(0.8), "b": scored(0.8)})
    assert headline(full, quantized_evaluation({"a": retained(0.8), "b": retained(0.8)})).good
    found = headline(full, quantized_evaluation({"a": retained(0.8), "b": retained(0.3, full=0.8)}))
    assert (found.good, found.text) == (False, "lost by quantization: b")
    assert headline(None, None).text == "not measured"
