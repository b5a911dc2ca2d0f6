"""`nvila ablate lr-ratio`: how much slower than the language model the vision tower is best tuned, by method."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from typing_extensions import override

from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.train import Stage
from nvila.components.contracts.steps import STAGES, VALIDATE
from nvila.pipelines.ablate import ratio_table
from nvila.pipelines.ablate.ratio_case import Settings
from nvila.pipelines.ablate.ratio_cases import SETTINGS, Case, stages_of
from nvila.pipelines.ablate.trials import Answers, Told, Trials
from nvila.pipelines.planning.memory import need
from nvila.pipelines.planning.shape import stage_shapes


class Experiment(Trials):
    """A recipe whose last stage is trained by each row, at each ratio and seed, from the model of the one before."""

    STEP, MODULE = "ablate-ratio-case", "nvila.pipelines.ablate.ratio_case"
    TITLE = "The rate of the vision tower"
    RULES = ratio_table.RULES
    CAPTION = (
        "Accuracy on held-out questions, mean ± standard deviation over seeds, at the tower's rate as a share of the "
        "language model's; + better than at 1, - below it, beyond noise. How the tower learns / how the language model."
    )

    @property
    def tuned(self) -> Stage:
        """The recipe's last stage."""
        stage = self.recipe.train.stages[STAGES.index(stages_of(self.recipe)[1])]
        assert stage
        return stage

    @override
    def check(self) -> None:
        for case in self.design.runs():
            self._stage(case)

    @property
    @override
    def shared(self) -> tuple[str, ...]:
        return VALIDATE, stages_of(self.recipe)[0][-1]

    @override
    def inputs(self, made: Mapping[str, Manifest]) -> dict[str, Manifest]:
        samples, model = self.shared
        return {"samples": made[samples], "model": made[model]}

    @override
    def settings(self, case: Case) -> Settings:
        recipe = self.recipe
        return Settings(
            stage=self._stage(case),
            run=recipe.train.run,
            tasks=recipe.evaluate.tasks,
            seed=recipe.seed + case.seed,
            question_seed=recipe.seed,
        )

    @override
    def table(self, answers: Answers, told: Told) -> list[dict[str, Any]]:
        shape = stage_shapes(self.recipe)[STAGES.index(stages_of(self.recipe)[1])]
        assert shape
        rows = [setting.stage(self.tuned, 1.0, self.design.full_rate) for setting in SETTINGS]
        memory = {s.name: need(self.recipe, row, shape).peak for s, row in zip(SETTINGS, rows, strict=True)}
        return ratio_table.table(self.design, answers, told, memory)

    @staticmethod
    @override
    def lines(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """Rows of the table downwards; of each source its ratios across, then memory and speed."""
        rows = result["table"]
        sources = list(dict.fromkeys(row["source"] for row in rows))
        ratios = list(dict.fromkeys(row["ratio"] for row in rows))
        cells = {(row["setting"], row["source"], row["ratio"]): row for row in rows}
        head = ["tower / language model", *(f"{source}, {ratio:g}" for source in sources for ratio in ratios)]
        body = []
        for name in dict.fromkeys(row["setting"] for row in rows):
            mine = [row for row in rows if row["setting"] == name]
            speeds = [row["steps_per_second"] for row in mine if row["steps_per_second"]]
            shown = [_cell(cells.get((name, source, ratio))) for source in sources for ratio in ratios]
            speed = f"{median(speeds):.2f}" if speeds else ""
            body.append([name, *shown, f"{mine[0]['bytes'] / 1e6:,.1f}", speed])
        return [*head, "memory, MB (formula)", "steps/s"], body

    def _stage(self, case: Case) -> Stage:
        return case.setting.stage(self.tuned, case.ratio, self.design.full_rate)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    mark = {"better": " +", "below": " -"}.get(row["verdict"] or "", "")
    return f"{row['mean']:.3f} ± {row['spread']:.3f}{mark}"
