from __future__ import annotations

import math
from typing import Any

import pytest

from nvila.components.metrics.standing import headline, standing


def _full(accuracy: float, half: float = 0.02, blind: float = 0.3) -> dict[str, Any]:
    only = {"accuracy": blind, "low": blind - 0.02, "high": blind + 0.02}
    return {"accuracy": accuracy, "low": accuracy - half, "high": accuracy + half, "question_only": only}


def _small(accuracy: float, **more: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02, **more}


@pytest.mark.parametrize(
    ("full", "quantized", "said"),
    [
        (_full(0.8), _small(0.8), "learnt"),
        (_full(0.8), _small(0.77), "learnt"),
        (_full(0.8), _small(0.95), "learnt"),
        (_full(0.8), _small(0.3), "lost by quantization"),
        (_full(0.8), _small(0.76), "lost by quantization"),
        (_full(0.8), _small(0.75, full=0.76), "learnt"),
        (_full(0.8), _small(math.nan), "lost by quantization"),
        (_full(0.8), None, "not measured after quantization"),
        (_full(0.35), _small(0.33), "not above its baseline after quantization"),
        (_full(0.33), _small(0.9), "not above its baseline"),
        (_full(0.1), _small(0.1), "not above its baseline"),
        (_full(math.nan), _small(0.8), "not above its baseline"),
        ({"accuracy": 0.9, "low": 0.8, "high": 1.0}, _small(0.9), "not above its baseline"),
    ],
)
def test_each_source_has_one_standing(full: dict[str, Any], quantized: dict[str, Any] | None, said: str) -> None:
    """A model that guesses, or that quantization broke, must not be called good anywhere."""
    assert standing(full, quantized) == said


def test_one_bad_source_spoils_the_headline() -> None:
    """An average would hide it."""
    full, small = {"a": _full(0.8), "b": _full(0.8)}, {"a": _small(0.8), "b": _small(0.3)}
    assert headline(full, {"a": _small(0.8), "b": _small(0.8)}).good
    found = headline(full, small)
    assert (found.good, found.text) == (False, "lost by quantization: b")
    assert headline({}, {}).text == "not measured"
