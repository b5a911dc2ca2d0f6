from pathlib import Path

import pytest

from nvila.components.contracts.errors import Rejected
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.evaluate import Gate
from nvila.components.contracts.recipe.quantize import QuantizeGate
from nvila.components.evaluate.gate import Settings, objections, run


def _measured(accuracy: float, low: float, baseline_high: float) -> dict:
    question_only = {"kind": "blank picture", "accuracy": baseline_high - 0.02, "high": baseline_high}
    return {"s": {"accuracy": accuracy, "low": low, "high": 1.0, "question_only": question_only}}


@pytest.mark.parametrize(
    ("measured", "refused"),
    [(_measured(0.8, 0.78, 0.7), 0), (_measured(0.71, 0.69, 0.7), 1), (_measured(0.45, 0.43, 0.3), 1)],
)
def test_gate_asks_for_accuracy_and_for_pictures_that_matter(measured: dict, refused: int) -> None:
    """Prevents a model that never looks at the picture from passing."""
    assert len(objections(Gate(min_accuracy={"s": 0.5}), measured)) == refused


@pytest.mark.parametrize(("fall", "refused"), [(0.02, 0), (0.045, 0), (0.06, 1), (-0.1, 0)])
def test_quantization_may_cost_its_share_and_the_noise(fall: float, refused: int) -> None:
    """Prevents noise of a small test from refusing a good model, and a real loss from passing."""
    measured = {"s": {"accuracy": 0.5, "fall": fall, "fall_noise": 0.02}}
    assert len(objections(QuantizeGate(max_loss=0.03), measured)) == refused


def test_refusal_ends_with_exit_code_three(tmp_path: Path) -> None:
    """Prevents a rejected model from looking like a fault, which a launcher would retry."""
    metrics = Manifest(step="evaluate", key="k", kind="metrics", values={"accuracy": _measured(0.1, 0.09, 0.7)})
    settings = Settings.model_validate({"gate": {"min_accuracy": {}, "above_question_only": True}})
    with pytest.raises(Rejected, match=r"s: exact match 0\.100") as caught:
        run(settings, {"metrics": metrics}, tmp_path)
    assert caught.value.exit_code == Exit.REJECTED
