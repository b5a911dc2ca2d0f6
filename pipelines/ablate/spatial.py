"""`nvila ablate spatial`: scale, then compress, on a small model: plain, S2, S2 with fewer tokens, and VEP besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.train import Stage
from nvila.components.contracts.steps import VALIDATE
from nvila.pipelines.ablate import spatial_table
from nvila.pipelines.ablate.spatial_case import Settings
from nvila.pipelines.ablate.spatial_cases import Case, rows_of
from nvila.pipelines.ablate.trials import Answers, Told, Trials


class Experiment(Trials):
    """A recipe whose model is made anew for each row and seed."""

    STEP, MODULE = "ablate-spatial-case", "nvila.pipelines.ablate.spatial_case"
    TITLE = "Scale, then compress"
    RULES = spatial_table.RULES
    CAPTION = (
        "Accuracy on held-out questions after stage 4, mean ± standard deviation over seeds; "
        "+ better than the row above, - below it, beyond noise."
    )

    @property
    def stages(self) -> dict[str, Stage]:
        """Of the recipe, by step."""
        return rows_of(self.recipe)

    @override
    def check(self) -> None:
        _ = self.stages

    @property
    @override
    def shared(self) -> tuple[str, ...]:
        return (VALIDATE,)

    @override
    def inputs(self, made: Mapping[str, Manifest]) -> dict[str, Manifest]:
        return {"samples": made[VALIDATE]}

    @override
    def settings(self, case: Case) -> Settings:
        recipe = self.recipe
        return Settings(
            model=case.setting.of(recipe.model),
            stages=case.setting.stages(self.stages),
            run=recipe.train.run,
            tasks=recipe.evaluate.tasks,
            seed=recipe.seed + case.seed,
            question_seed=recipe.seed,
        )

    @override
    def table(self, answers: Answers, told: Told) -> list[dict[str, Any]]:
        return spatial_table.table(self.design, answers, told)

    @staticmethod
    @override
    def lines(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """Settings downwards, sources across."""
        rows = result["table"]
        sources = list(dict.fromkeys(row["source"] for row in rows))
        cells = {(row["setting"], row["source"]): row for row in rows}
        spent = {name: sum(c["cpu_seconds"] for c in result["cases"] if c["setting"] == name) for name, _ in cells}
        head = ["", "pool", "tiles", "tokens", *sources, "CPU minutes a seed"]
        body = []
        for name in dict.fromkeys(row["setting"] for row in rows):
            first = cells[name, sources[0]]
            shown = [first["pool"], f"{first['tiles']:.1f}", f"{first['tokens']:.0f}"]
            minutes = f"{spent[name] / 60 / result['design']['seeds']:.1f}"
            body.append([name, *shown, *(cell(cells[name, s]) for s in sources), minutes])
        chances = {row["source"]: row["chance"] for row in rows if "chance" in row}
        body.append(["chance", "", "", "", *(f"{chances[s]:.3f}" if s in chances else "" for s in sources), ""])
        return head, body


def cell(row: Mapping[str, Any]) -> str:
    """Mean and spread, with a mark where it is no better than chance, or differs from the row above."""
    mark = {"better": " +", "below": " -"}.get(row.get("verdict") or "", "")
    return f"{row['mean']:.3f} ± {row['spread']:.3f}{mark}" + ("" if row.get("above_chance", True) else " (at chance)")
