import math
from pathlib import Path
from typing import Any

import pytest
from telling import evaluation, retained, scored

from nvila.components.contracts.errors import Rejected
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.evaluate import Gate
from nvila.components.contracts.recipe.quantize import QuantizeGate
from nvila.components.contracts.results.accuracy import Base, Baseline, Retained, Scored
from nvila.components.gate.step import Settings, run
from nvila.components.metrics import accuracy
from nvila.components.metrics.gates import objections, objections_to_quantized


def _measured(value: float, low: float, baseline_high: float) -> dict[str, Scored]:
    found = scored(value, blind=baseline_high - 0.02)
    return {"s": found.model_copy(update={"low": low})}


@pytest.mark.parametrize(
    ("measured", "refused"),
    [(_measured(0.8, 0.78, 0.7), 0), (_measured(0.71, 0.69, 0.7), 1), (_measured(0.45, 0.43, 0.3), 1)],
)
def test_gate_asks_for_accuracy_and_for_pictures_that_matter(measured: dict[str, Scored], refused: int) -> None:
    """Prevents a model that never looks at the picture from passing."""
    assert len(objections(Gate(min_accuracy={"s": 0.5}), measured)) == refused


@pytest.mark.parametrize(
    ("fall", "noise", "refused"),
    [(0.02, 0.009, 0), (0.0, 0.03, 0), (0.02, 0.02, 1), (0.06, 0.0, 1), (-0.1, 0.02, 0)],
)
def test_quantization_must_be_shown_to_cost_little(fall: float, noise: float, refused: int) -> None:
    """Noise must not help: a fall that few questions cannot tell from a large one does not pass."""
    lost = retained(0.5).model_copy(update={"fall": fall, "fall_noise": noise})
    assert len(objections_to_quantized(QuantizeGate(max_loss=0.03), {"s": lost})) == refused


def test_three_of_ten_lost_do_not_pass() -> None:
    """The old gate let a fall of 0.30 through, as ten questions are so noisy."""
    measured = {"s": _retained([True] * 10, [False] * 3 + [True] * 7)}
    assert len(objections_to_quantized(QuantizeGate(max_loss=0.03), measured)) == 2
    assert len(objections_to_quantized(QuantizeGate(max_loss=0.03, least_questions=10), measured)) == 1


@pytest.mark.parametrize(
    "gate", [Gate(), Gate(above_question_only=False, min_accuracy={"s": 0.0}), QuantizeGate(max_loss=1)]
)
@pytest.mark.parametrize("n", [0, 1, 29])
def test_a_handful_of_questions_opens_no_gate(gate: Gate | QuantizeGate, n: int) -> None:
    """One right answer of one is an accuracy of 1.000."""
    assert any("too few" in reason for reason in _asked(gate, n))


@pytest.mark.parametrize("gate", [Gate(above_question_only=False), Gate(), QuantizeGate()])
def test_nothing_measured_is_nothing_shown(gate: Gate | QuantizeGate) -> None:
    """A loop over no sources finds no fault."""
    ask = objections_to_quantized if isinstance(gate, QuantizeGate) else objections
    assert "no source was measured" in ask(gate, {})  # type: ignore[operator]


def test_a_source_that_was_not_measured_is_named() -> None:
    """It was a KeyError, which looks like a fault of ours."""
    (reason,) = objections(Gate(min_accuracy={"t": 0.5}), _measured(0.8, 0.78, 0.7))
    assert reason.startswith("t: was not measured")


@pytest.mark.parametrize("none", [None, math.nan, math.inf, "much"])
@pytest.mark.parametrize("name", ["value", "low", "high", "n", "fall", "fall_noise", "full"])
def test_what_is_no_number_reaches_no_gate(name: str, none: object) -> None:
    """A null in the metrics was a TypeError, NaN passed every `is it below`, an infinite accuracy was above all."""
    good = retained(0.9).model_dump()
    assert Retained.model_validate(good)
    with pytest.raises(ValueError, match=name):
        Retained.model_validate(good | {name: none})


@pytest.mark.parametrize(
    ("gate", "least"),
    [(Gate(), 30), (Gate(least_questions=1), 4), (QuantizeGate(), 185), (QuantizeGate(max_loss=1.0), 30)],
)
def test_so_many_questions_does_a_gate_need(gate: Gate | QuantizeGate, least: int) -> None:
    """A model that makes no mistake and loses nothing passes with so many questions, and none passes with fewer."""

    assert _asked(gate, least) == []
    assert _asked(gate, least - 1) != []


def _asked(gate: Gate | QuantizeGate, n: int) -> list[str]:
    """What the gate has against a model that makes no mistake in so many questions, and loses nothing."""
    right, wrong = accuracy.measured("accuracy", [True] * n), accuracy.measured("accuracy", [False] * n)
    if isinstance(gate, QuantizeGate):
        return objections_to_quantized(gate, {"s": _retained([True] * n, [True] * n)})
    only = Baseline(**wrong.model_dump(), kind="blank picture")
    return objections(gate, {"s": Scored(**right.model_dump(), majority=wrong, question_only=only, baselines={})})


def _retained(before: list[bool], after: list[bool]) -> Retained:
    lost, noise = accuracy.fall(before, after)
    told = accuracy.measured("accuracy", after).model_dump()
    return Retained(**told, full=accuracy.measured("accuracy", before), fall=lost, fall_noise=noise)


def test_refusal_ends_with_exit_code_three(tmp_path: Path) -> None:
    """Prevents a rejected model from looking like a fault, which a launcher would retry."""
    metrics = Manifest(step="evaluate", key="k", kind="metrics", result=evaluation(_measured(0.1, 0.09, 0.7)))
    settings = Settings.model_validate({"gate": {"min_accuracy": {}, "above_question_only": True}})
    with pytest.raises(Rejected, match=r"s: exact match 0\.100") as caught:
        run(settings, {"metrics": metrics}, tmp_path)
    assert caught.value.exit_code == Exit.REJECTED


@pytest.mark.parametrize(
    ("before", "after", "gate", "refused"),
    [
        ([1] * 90 + [0] * 10, [1] * 95 + [0] * 5, {"not_below_base": ["s"]}, 0),
        ([1] * 90 + [0] * 10, [1] * 89 + [0] * 11, {"not_below_base": ["s"]}, 0),
        ([1] * 90 + [0] * 10, [1] * 75 + [0] * 25, {"not_below_base": ["s"]}, 1),
        ([1] * 90 + [0] * 10, [1] * 75 + [0] * 25, {"max_forgotten": {"s": 0.3}}, 0),
        ([1] * 90 + [0] * 10, [1] * 80 + [0] * 20, {"max_forgotten": {"s": 0.1}}, 1),
        (None, [1] * 80, {"max_forgotten": {"s": 0.1}}, 1),
        ([1] * 90 + [0] * 10, [1] * 75 + [0] * 25, {}, 0),
    ],
)
def test_a_tuned_model_is_held_against_what_it_was(
    before: list[float] | None, after: list[float], gate: dict[str, Any], refused: int
) -> None:
    """Tuned on one thing a model forgets others; noise of few questions must neither hide that nor look like it."""
    model = scored(sum(after) / len(after), n=len(after))
    if before is not None:
        fall, low, high = accuracy.fall_interval(before, after)
        assert low <= fall <= high
        told = accuracy.measured("accuracy", before).model_dump()
        model = model.model_copy(update={"base": Base(**told, fall=fall, fall_low=low, fall_high=high)})
    asked = Gate.model_validate({"above_question_only": False, **gate})
    assert len(objections(asked, {"s": model})) == refused
