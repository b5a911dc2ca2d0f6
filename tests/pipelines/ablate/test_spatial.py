"""The rows of `nvila ablate spatial`, and what its table says of made-up answers."""

from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.pipelines.ablate.spatial import Experiment
from nvila.pipelines.ablate.spatial_cases import ENCODER, SETTINGS, Case, Design, rows_of
from nvila.pipelines.ablate.spatial_table import table
from nvila.pipelines.commands.overrides import asked_for

QUESTIONS = 200


def recipe(*overrides: str) -> Recipe:
    return asked_for("tiny-spatial", overrides)[1]


def test_rows_differ_in_what_the_table_names_and_in_nothing_else() -> None:
    """A row that saw other samples, or more of them, would tell of data and not of tiles, pooling or VEP."""
    stages = rows_of(recipe())
    for setting in SETTINGS:
        rows = setting.stages(stages)
        assert list(rows) == list(stages)
        for name, row in rows.items():
            changed = {key for key, value in row.model_dump().items() if value != stages[name].model_dump()[key]}
            assert changed == (set() if setting.encoder or name != ENCODER else {"trainable"})
        model, given = setting.of(recipe().model).model_dump(), recipe().model.model_dump()
        assert {key for key in model if model[key] != given[key]} <= {"vision_mode", "projector"}


@pytest.mark.parametrize(
    "override",
    ["train.stages.train-2=null", "train.stages.train-4.pruned=true", "train.stages.train-2.trainable=[mm_projector]"],
)
def test_a_recipe_without_these_rows_is_refused(override: str) -> None:
    """Told after an hour that stage 2 was missing, nobody has a table."""
    with pytest.raises(ConfigError, match=r"stage 2|stages 1 to 4|all samples"):
        rows_of(recipe(override))


def made_up(right: dict[int, float], seeds: int) -> list[dict[str, Any]]:
    """The table where so large a share of each row's answers is right, and the question's text tells 0.4."""
    answers, told = {}, {}
    for case in Design(seeds).runs():
        worth = right[case.place] + 0.005 * case.seed
        answers[case] = [
            {
                "id": f"{i:03d}",
                "source": "digits",
                "worth": float(i % 100 < 100 * worth),
                "text_alone": float(i % 5 < 2),
            }
            for i in range(QUESTIONS)
        ]
        told[case] = {"shown": {"digits": {"tiles": 5.0, "tokens": 36.0}}}
    return table(Design(seeds), answers, told)


def test_what_is_beyond_noise_is_told_and_a_row_at_chance_as_such() -> None:
    """A row no better than guessing, told as a result, is the commonest fault of such tables."""
    rows = [row for row in made_up({0: 0.4, 1: 0.8, 2: 0.6, 3: 0.605}, seeds=3) if row["source"] == "digits"]
    assert [row["above_chance"] for row in rows] == [False, True, True, True]
    assert [row["verdict"] for row in rows] == [None, "better", "below", "no difference beyond noise"]
    assert rows[1]["mean"] == pytest.approx(0.805, abs=0.01) and rows[1]["spread"] == pytest.approx(0.005, abs=0.004)
    result = {
        "table": rows,
        "design": {"seeds": 3},
        "cases": [{"setting": s.name, "cpu_seconds": 60} for s in SETTINGS],
    }
    head, body = Experiment.lines(result)
    assert "at chance" in " ".join(body[0]) and "0.800" not in " ".join(body[0]) and len(body) == len(SETTINGS) + 1
    assert head[4] == "digits" and body[-1][4] == "0.400"


def test_one_seed_compares_no_rows() -> None:
    """A pilot says what lies above chance, and nothing of which row is better."""
    rows = [row for row in made_up({0: 0.4, 1: 0.8, 2: 0.6, 3: 0.6}, seeds=1) if row["source"] == "digits"]
    assert [row["above_chance"] for row in rows] == [False, True, True, True]
    assert {row["verdict"] for row in rows} == {None, "not tested"}


def test_a_stop_half_way_leaves_whole_tables() -> None:
    """Cases come seed by seed, so that what is finished can be read as a table of fewer seeds."""
    assert Design(2).runs() == [Case(seed, place) for seed in (0, 1) for place in range(4)]
