"""What AdamW is told of a stage: rates by part, what decays, and that clipping acts."""

from __future__ import annotations

from typing import Any

import clipping
import pytest

from nvila.components.contracts.recipe.train import Stage

ROW: dict[str, Any] = {"name": "x", "learning_rate": 1e-3, "data": {"a.sft": 1}, "batch": 1, "weight_decay": 0.1}


def test_norms_and_biases_do_not_decay(small: Any) -> None:
    """Decay of a norm's weights pulls activations to nothing; the reference lets embeddings decay, and so do we."""
    from nvila.components.model.checkpoint.native import load_native
    from nvila.components.train.optimizer import parameter_groups
    from nvila.components.train.tuning import tune

    model, _ = load_native(small.model.dir("model"))
    row = {"trainable": ["llm", "vision_tower", "mm_projector"], "learning_rates": {"vision_tower": 1e-4}}
    stage = Stage.model_validate(ROW | row)
    tune(model, stage)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, stage)
        for p in group["params"]
    }
    assert found.keys() == set(names.values())
    assert {name for name, (rate, _) in found.items() if rate == 1e-4} == {
        name for name in found if name.startswith("vision_tower.")
    }
    still = {name for name, (_, decay) in found.items() if decay == 0.0}
    assert still == {name for name in found if "bias" in name or "norm" in name or "layers.1.weight" in name[-15:]}
    assert found["llm.model.embed_tokens.weight"] == (1e-3, 0.1)
    assert parameter_groups(model, stage)[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("rates", "words"),
    [({"llm": 1e-4}, "llm is not trainable"), ({"mm_projector": 1e-4}, "learning_rate would have no effect")],
)
def test_a_rate_without_effect_is_refused(rates: dict[str, float], words: str) -> None:
    """A rate of a frozen part would be read as if it were at work."""
    with pytest.raises(ValueError, match=words):
        Stage.model_validate(ROW | {"trainable": ["mm_projector"], "learning_rates": rates})


@pytest.mark.usefixtures("one_rank")
def test_clipping_acts() -> None:
    """The reference's ZeRO configurations without `gradient_clipping` left `max_grad_norm` without effect.

    A gradient of norm 1e-6 in 64 weights and their biases stands beside AdamW's epsilon of 1e-8.
    """
    each = 1e-6 / (64 * 64 + 64) ** 0.5
    ratio = clipping.moved("bf16", 2, 1e-6) / clipping.moved("bf16", 2, None)
    assert ratio == pytest.approx(each / (each + 1e-8), rel=1e-2)
