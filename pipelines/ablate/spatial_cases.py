"""What `nvila ablate spatial` compares: the rows of the paper's table 1, and how a recipe becomes one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.model import ModelSettings
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.train import Stage
from nvila.components.contracts.steps import STAGES

ENCODER = STAGES[1]
"""Stage 2: vision-encoder pre-training."""
LAST = STAGES[3]
"""The stage after which the questions are asked; clips come behind it."""


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    name: str
    pool: str
    """Side of the square of features that becomes a token."""
    model: Mapping[str, Any] = field(hash=False)
    """Laid over the recipe's model."""
    encoder: bool = False
    """Whether stage 2 trains the vision tower (VEP), or only the projector, on the same samples."""

    def of(self, model: ModelSettings) -> ModelSettings:
        """The recipe's model as this row has it.

        Raises:
            ConfigError: they do not fit.
        """
        try:
            return ModelSettings.model_validate(model.model_dump() | dict(self.model))
        except ValueError as error:
            raise ConfigError(f"the model cannot be made {self.name}", where="model", value=str(error)) from None

    def stages(self, rows: Mapping[str, Stage]) -> dict[str, Stage]:
        """The stages as this row trains them."""
        if self.encoder:
            return dict(rows)
        projector = rows[ENCODER].model_copy(update={"trainable": ["mm_projector"]})
        return {**rows, ENCODER: projector}


PLAIN = {"vision_mode": "resize"}
SCALED = {"vision_mode": "s2"}
POOL_2 = {"projector": "mlp_downsample_2x2_fix"}
POOL_3 = {"projector": "mlp_downsample_3x3_fix"}
SETTINGS = (
    Setting("plain", "2x2", PLAIN | POOL_2),
    Setting("S2 + 2x2", "2x2", SCALED | POOL_2),
    Setting("S2 + 3x3", "3x3", SCALED | POOL_3),
    Setting("S2 + 3x3 + VEP", "3x3", SCALED | POOL_3, encoder=True),
)
"""From top to bottom: plain, scaled, compressed, and the encoder trained for it."""


@dataclass(frozen=True, order=True)
class Case:
    """One training of a row."""

    seed: int
    place: int
    """Of the row in `SETTINGS`."""

    @property
    def setting(self) -> Setting:
        """The row."""
        return SETTINGS[self.place]

    @property
    def name(self) -> str:
        """For people and logs."""
        return f"{self.setting.name}, seed {self.seed}"

    @property
    def told(self) -> dict[str, Any]:
        """What it is, for the result."""
        return {"setting": self.setting.name, "seed": self.seed}


@dataclass(frozen=True)
class Design:
    """What is compared."""

    seeds: int = 3

    def runs(self) -> list[Case]:
        """Those with the lowest seeds first: a stop half-way leaves whole tables of fewer seeds."""
        return [Case(seed, place) for seed in range(self.seeds) for place in range(len(SETTINGS))]


def rows_of(recipe: Recipe) -> dict[str, Stage]:
    """Stages 1 to 4, by step.

    Raises:
        ConfigError: one of them is left out, or pruned, or the recipe's model is not made here.
    """
    if recipe.model.base.vision_tower is not None:
        raise ConfigError(
            "the table is of models that are made here; published weights have been trained for one of its rows",
            where="model.base.vision_tower",
            value=recipe.model.base.vision_tower,
        )
    rows = dict(zip(STAGES, recipe.train.stages, strict=False))
    names = STAGES[: STAGES.index(LAST) + 1]
    found = {name: stage for name in names if (stage := rows.get(name))}
    if missing := [name for name in names if name not in found]:
        raise ConfigError("the table needs stages 1 to 4", where=f"train.stages.{missing[0]}", value="left out")
    if pruned := [name for name, stage in found.items() if stage.pruned]:
        raise ConfigError("every row trains on all samples: set `pruned: false`", where=f"train.stages.{pruned[0]}")
    if "vision_tower" not in found[ENCODER].trainable:
        raise ConfigError("stage 2 is what VEP is: it must train the vision_tower", where=f"train.stages.{ENCODER}")
    return found
