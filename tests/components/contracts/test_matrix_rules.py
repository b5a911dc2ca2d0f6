"""The rules of what goes together in training, as recipes and people meet them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.matrix import RULES, Cell, Rule, cells, refusals
from nvila.pipelines.cli import app

FINE = Cell(0, "bf16", "frozen", "full", "none", "padded")


def _overrides(cell: Cell) -> dict[str, Any]:
    """Of a recipe with a cell's options in its fourth stage."""
    methods = {part: how for part, how in (("vision_tower", cell.vision_tower), ("llm", cell.llm)) if how != "frozen"}
    train: dict[str, Any] = {name: getattr(cell, name) for name in ("zero", "precision", "offload", "packing")}
    return {"train": train | {"stages": {"train-4": {"trainable": [*methods], "methods": methods}}}}


def _broken(rule: Rule) -> Cell:
    """A cell that this rule alone refuses, as near to a fine one as there is."""
    alone = [cell for cell in cells() if refusals(cell) == [rule]]
    return min(alone, key=lambda cell: sum(getattr(cell, name) != value for name, value in vars(FINE).items()))


def test_what_is_fine_is_taken() -> None:
    """A rule too many keeps people from what works."""
    assert fill_in(Form(recipe="micro", overrides=_overrides(FINE))).train.stages[3]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.why[:40])
def test_each_rule_refuses_a_recipe_with_its_reason(rule: Rule) -> None:
    """What does not go together ends hours into a run, or trains something else."""
    with pytest.raises(ConfigError) as refused:
        fill_in(Form(recipe="micro", overrides=_overrides(_broken(rule))))
    assert rule.why in str(refused.value)
    assert f"train.{rule.option.replace('*', '3')}" in str(refused.value)


def test_a_rule_of_the_run_is_told_once() -> None:
    """Five stages that break it are one mistake."""
    with pytest.raises(ConfigError) as refused:
        fill_in(Form(recipe="micro", overrides=_overrides(replace(FINE, offload="cpu"))))
    assert str(refused.value).count("train.offload") == 1


def test_the_matrix_is_shown() -> None:
    """The table must be that of the rules, for people and for programs."""
    shown = CliRunner().invoke(app, ["plan", "--matrix"])
    assert shown.exit_code == 0 and all(rule.why in " ".join(shown.stdout.split()) for rule in RULES)
    told = json.loads(CliRunner().invoke(app, ["plan", "--matrix", "--json"]).stdout)
    assert len(told["cells"]) == len(list(cells()))
    allowed = sum(not refusals(cell) for cell in cells())
    assert sum(not cell["refused_by"] for cell in told["cells"]) == allowed
    assert f"{allowed:,} of" in shown.stdout
    assert CliRunner().invoke(app, ["plan"]).exit_code == 2
