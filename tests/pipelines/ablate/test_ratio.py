"""The rows of `nvila ablate lr-ratio`, and what its table says of made-up answers."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError, NvilaError
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.pipelines.ablate.ratio import Experiment
from nvila.pipelines.ablate.ratio_cases import RATIOS, SETTINGS, Case, Design, stages_of
from nvila.pipelines.ablate.ratio_table import table
from nvila.pipelines.commands.ablate import of_models
from nvila.pipelines.commands.overrides import asked_for

QUESTIONS = 200
FULL_RATE = 4e-4


def recipe(*overrides: str) -> Recipe:
    return asked_for("tiny-lr-ratio", overrides)[1]


def test_rows_differ_in_methods_and_rates_and_in_nothing_else() -> None:
    """A row that saw other samples, or a rate of its own, would tell of these and not of the method."""
    stage = recipe().train.stages[-1]
    assert stage
    rates = set()
    for setting in SETTINGS:
        for ratio in setting.ratios:
            row = setting.stage(stage, ratio, FULL_RATE)
            changed = {key for key, value in row.model_dump().items() if value != stage.model_dump()[key]}
            assert changed <= {"methods", "learning_rate", "learning_rates", "lora"}
            assert row.learning == {**setting.methods, "mm_projector": "full"}
            assert row.rate("vision_tower") == pytest.approx(ratio * row.rate("llm"))
            assert row.rate("mm_projector") == row.rate("llm")
            rates.add((row.rate("llm"), row.method("llm") == "full"))
    assert rates == {(stage.learning_rate, False), (FULL_RATE, True)}


@pytest.mark.parametrize(
    "override",
    [
        "train.stages.train-5.methods.llm=full",
        "train.stages.train-5.learning_rates.vision_tower=1e-5",
        "train.stages.train-5.pruned=true",
        "train.stages.train-5.trainable=[mm_projector, llm]",
    ],
)
def test_a_recipe_that_the_table_could_not_change_is_refused(override: str) -> None:
    """What it says of methods and rates would be passed over in silence."""
    given = [override, "train.stages.train-5.methods.vision_tower=null"] if "trainable" in override else [override]
    with pytest.raises(ConfigError, match=r"train-5|methods|lora"):
        stages_of(recipe(*given))


def test_a_single_stage_has_nothing_to_start_from() -> None:
    """The table is of fine-tuning: a model without any training would be at chance in every row."""
    alone = [f"train.stages.train-{number}=null" for number in range(1, 5)]
    with pytest.raises(ConfigError, match="start from"):
        stages_of(recipe(*alone))


def made_up(right: dict[float, float], seeds: int) -> list[dict[str, Any]]:
    """The table where so large a share of the answers is right at each ratio."""
    design = Design(seeds)
    answers, told = {}, {}
    for case in design.runs():
        worth = right[case.ratio] + 0.005 * case.seed
        answers[case] = [
            {"id": f"{i:03d}", "source": "digits", "worth": float(i % 100 < 100 * worth)} for i in range(QUESTIONS)
        ]
        told[case] = {"steps_per_second": 2.0 + case.seed}
    return table(design, answers, told, {setting.name: 1000 for setting in SETTINGS})


def test_what_is_beyond_noise_is_told() -> None:
    """The best of four ratios is always better than the first on these very questions: chance alone makes it so."""
    rows = made_up(dict(zip(RATIOS, (0.5, 0.8, 0.505, 0.3), strict=True)), seeds=3)
    first = [row for row in rows if row["setting"] == SETTINGS[0].name]
    assert [row["verdict"] for row in first] == [None, "better", "no difference beyond noise", "below"]
    assert {row["steps_per_second"] for row in rows} == {3.0}
    head, body = Experiment.lines({"table": rows})
    assert head[1:5] == ["digits, 1", "digits, 0.2", "digits, 0.1", "digits, 0.02"] and len(body) == len(SETTINGS)
    assert body[0][2].endswith("+") and body[0][4].endswith("-") and body[-1][2:5] == ["", "", ""]


def test_one_seed_compares_nothing() -> None:
    """A pilot says what lies where, and nothing of which ratio is better."""
    rows = made_up(dict(zip(RATIOS, (0.5, 0.8, 0.5, 0.3), strict=True)), seeds=1)
    assert {row["verdict"] for row in rows} == {None, "not tested"}


def test_a_stop_half_way_leaves_whole_tables() -> None:
    """Cases come seed by seed, so that what is finished can be read as a table of fewer seeds."""
    runs = Design(2).runs()
    assert [case.seed for case in runs] == sorted(case.seed for case in runs)
    assert runs[:4] == [Case(0, 0, ratio) for ratio in RATIOS] and len(runs) == 2 * 21


def test_an_endpoint_that_is_running_refuses_no_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is served: an experiment was told to choose another port."""

    def stop(*_: Any) -> Any:
        raise NvilaError("as far as the work")

    monkeypatch.setattr(Experiment, "run", stop)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        options = {"jobs": 1, "out": tmp_path / "out.json", "store": tmp_path, "runs": tmp_path, "dry_run": False}
        given = [f"rollout.port={busy.getsockname()[1]}", "needs.memory_bytes=0", "needs.disk_bytes=0"]
        with pytest.raises(NvilaError, match="as far as the work"):
            of_models(Experiment, "tiny-lr-ratio", given, Design(1), **options)
