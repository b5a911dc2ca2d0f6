import math
from pathlib import Path

import pytest

from nvila.components.contracts.errors import Rejected
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.evaluate import Gate
from nvila.components.contracts.recipe.quantize import QuantizeGate
from nvila.components.gate.step import Settings, run
from nvila.components.metrics import accuracy
from nvila.components.metrics.gates import objections


def _measured(accuracy: float, low: float, baseline_high: float) -> dict:
    question_only = {"kind": "blank picture", "accuracy": baseline_high - 0.02, "high": baseline_high}
    return {"s": {"accuracy": accuracy, "low": low, "high": 1.0, "n": 1000, "question_only": question_only}}


@pytest.mark.parametrize(
    ("measured", "refused"),
    [(_measured(0.8, 0.78, 0.7), 0), (_measured(0.71, 0.69, 0.7), 1), (_measured(0.45, 0.43, 0.3), 1)],
)
def test_gate_asks_for_accuracy_and_for_pictures_that_matter(measured: dict, refused: int) -> None:
    """Prevents a model that never looks at the picture from passing."""
    assert len(objections(Gate(min_accuracy={"s": 0.5}), measured)) == refused


@pytest.mark.parametrize(
    ("fall", "noise", "refused"),
    [(0.02, 0.009, 0), (0.0, 0.03, 0), (0.02, 0.02, 1), (0.06, 0.0, 1), (-0.1, 0.02, 0), (math.nan, 0.0, 1)],
)
def test_quantization_must_be_shown_to_cost_little(fall: float, noise: float, refused: int) -> None:
    """Noise must not help: a fall that few questions cannot tell from a large one does not pass."""
    measured = {"s": {"accuracy": 0.5, "n": 1000, "fall": fall, "fall_noise": noise}}
    assert len(objections(QuantizeGate(max_loss=0.03), measured)) == refused


def test_three_of_ten_lost_do_not_pass() -> None:
    """The old gate let a fall of 0.30 through, as ten questions are so noisy."""
    lost, noise = accuracy.fall([True] * 10, [False] * 3 + [True] * 7)
    measured = {"s": {**accuracy.accuracy([True] * 7 + [False] * 3), "fall": lost, "fall_noise": noise}}
    assert len(objections(QuantizeGate(max_loss=0.03), measured)) == 2
    assert len(objections(QuantizeGate(max_loss=0.03, least_questions=10), measured)) == 1


@pytest.mark.parametrize(
    "gate", [Gate(), Gate(above_question_only=False, min_accuracy={"s": 0.0}), QuantizeGate(max_loss=1)]
)
@pytest.mark.parametrize("n", [0, 1, 29])
def test_a_handful_of_questions_opens_no_gate(gate: Gate | QuantizeGate, n: int) -> None:
    """One right answer of one is an accuracy of 1.000."""
    lost, noise = accuracy.fall([True] * n, [True] * n)
    baseline = accuracy.accuracy([False] * n)
    measured = {"s": {**accuracy.accuracy([True] * n), "question_only": baseline, "fall": lost, "fall_noise": noise}}
    assert any("too few" in reason for reason in objections(gate, measured))


@pytest.mark.parametrize("gate", [Gate(above_question_only=False), Gate(), QuantizeGate()])
def test_nothing_measured_is_nothing_shown(gate: Gate | QuantizeGate) -> None:
    """A loop over no sources finds no fault."""
    assert objections(gate, {}) == ["no source was measured"]


def test_a_source_that_was_not_measured_is_named() -> None:
    """It was a KeyError, which looks like a fault of ours."""
    (reason,) = objections(Gate(min_accuracy={"t": 0.5}), _measured(0.8, 0.78, 0.7))
    assert reason.startswith("t: was not measured")


def test_a_number_that_is_none_passes_nothing() -> None:
    """Every comparison with NaN is false, so a gate that asks `is it below` lets it through."""
    assert len(objections(Gate(min_accuracy={"s": 0.5}), _measured(math.nan, math.nan, 0.7))) == 2


@pytest.mark.parametrize("none", [None, math.nan, math.inf, "0.9"])
@pytest.mark.parametrize("name", ["accuracy", "low", "n", "fall", "fall_noise"])
def test_what_is_no_number_is_an_objection_and_no_fault(name: str, none: object) -> None:
    """Metrics are JSON: a null there was a TypeError, and an infinite accuracy was above everything."""
    good = {**_measured(0.9, 0.88, 0.7)["s"], "fall": -0.01, "fall_noise": 0.02}
    gates = Gate(min_accuracy={"s": 0.5}), QuantizeGate()
    assert not any(objections(gate, {"s": good}) for gate in gates)
    assert any(objections(gate, {"s": good | {name: none}}) for gate in gates)


@pytest.mark.parametrize(
    ("gate", "least"),
    [(Gate(), 30), (Gate(least_questions=1), 4), (QuantizeGate(), 185), (QuantizeGate(max_loss=1.0), 30)],
)
def test_so_many_questions_does_a_gate_need(gate: Gate | QuantizeGate, least: int) -> None:
    """A model that makes no mistake and loses nothing passes with so many questions, and none passes with fewer."""

    def flawless(questions: int) -> dict:
        right, wrong = [True] * questions, [False] * questions
        lost, noise = accuracy.fall(right, right)
        return {
            "s": {
                **accuracy.accuracy(right),
                "question_only": accuracy.accuracy(wrong),
                "fall": lost,
                "fall_noise": noise,
            }
        }

    assert objections(gate, flawless(least)) == []
    assert objections(gate, flawless(least - 1)) != []


def test_refusal_ends_with_exit_code_three(tmp_path: Path) -> None:
    """Prevents a rejected model from looking like a fault, which a launcher would retry."""
    metrics = Manifest(step="evaluate", key="k", kind="metrics", values={"accuracy": _measured(0.1, 0.09, 0.7)})
    settings = Settings.model_validate({"gate": {"min_accuracy": {}, "above_question_only": True}})
    with pytest.raises(Rejected, match=r"s: exact match 0\.100") as caught:
        run(settings, {"metrics": metrics}, tmp_path)
    assert caught.value.exit_code == Exit.REJECTED
