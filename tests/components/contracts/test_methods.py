"""How parts learn is refused where it could not take effect, with the option and the reason."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nvila.components.contracts.recipe.methods import METHODS, Lora
from nvila.components.contracts.recipe.train import Stage

ROW: dict[str, Any] = {
    "name": "x",
    "trainable": ["vision_tower", "mm_projector", "llm"],
    "learning_rate": 1e-4,
    "data": {"a.sft": 1},
    "batch": 4,
}


def test_a_part_learns_in_full_unless_said_otherwise() -> None:
    """A default by method would train half of what older recipes train."""
    stage = Stage.model_validate(ROW)
    assert {stage.method(part) for part in METHODS} == {"full"} and stage.adapted == []
    assert stage.lora == Lora(rank=64, alpha=16, dropout=0.05)


@pytest.mark.parametrize("tower", METHODS["vision_tower"])
@pytest.mark.parametrize("llm", METHODS["llm"])
def test_every_way_of_the_paper_is_a_recipe(tower: str, llm: str) -> None:
    """One that the schema refuses by mistake could not be compared with its neighbours."""
    stage = Stage.model_validate(ROW | {"methods": {"vision_tower": tower, "llm": llm}})
    assert set(stage.adapted) == {p for p, m in (("vision_tower", tower), ("llm", llm)) if m.endswith("ora")}


@pytest.mark.parametrize(
    "change, option, why",
    [
        ({"trainable": ["llm"], "methods": {"vision_tower": "lora"}}, "methods.vision_tower", "not trainable"),
        ({"methods": {"llm": "layernorm"}}, "methods.llm", "full or lora or dora or qlora"),
        ({"methods": {"vision_tower": "qlora"}}, "methods.vision_tower", "full or layernorm or lora"),
        ({"methods": {"mm_projector": "lora"}}, "methods.mm_projector", "learns by full"),
        ({"methods": {"vision_tower": "layernorm"}, "lora": {"rank": 8}}, "lora", "no effect"),
        ({"methods": {"llm": "lora"}, "model": {"time_tokens": 10}}, "model.time_tokens", "no adapters"),
        (
            {"trainable": ["vision_tower"], "methods": {"vision_tower": "layernorm"}, "weight_decay": 0.1},
            "weight_decay",
            "do not decay",
        ),
    ],
)
def test_what_cannot_take_effect_is_refused(change: dict[str, Any], option: str, why: str) -> None:
    """A recipe would say LoRA, or a rank, and the stage train something else."""
    with pytest.raises(ValidationError) as caught:
        Stage.model_validate(ROW | change)
    assert [".".join(map(str, e["loc"])) for e in caught.value.errors()] == [option]
    assert why in str(caught.value)
