"""What `nvila ablate lr-ratio` compares: rows of the paper's table 6, each with several rates of the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.methods import ADAPTERS, Method, Part
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.train import Stage
from nvila.components.contracts.steps import STAGES

RATIOS = (1.0, 0.2, 0.1, 0.02)
"""Rates of the vision tower, as shares of the language model's: the paper's 1, 1/5, 1/10 and 1/50."""


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    name: str
    methods: Mapping[Part, Method] = field(hash=False)
    ratios: tuple[float, ...] = RATIOS

    def stage(self, row: Stage, ratio: float, full_rate: float) -> Stage:
        """The tuned stage as this row trains it.

        Args:
            row: of the recipe; its rate is that of a language model that learns by adapters.
            ratio: of the tower's rate to the language model's.
            full_rate: of a language model that is trained in full.
        """
        rate = row.learning_rate if self.methods["llm"] in ADAPTERS else full_rate
        changes: dict[str, Any] = {"methods": dict(self.methods), "learning_rate": rate}
        changes["learning_rates"] = {} if ratio == 1 else {"vision_tower": ratio * rate}
        if not ADAPTERS & set(self.methods.values()):
            changes["lora"] = {}
        return Stage.model_validate(row.model_dump() | changes)


def _setting(name: str, tower: Method, llm: Method, *ratios: float) -> Setting:
    return Setting(name, {"vision_tower": tower, "llm": llm}, ratios or RATIOS)


SETTINGS = (
    _setting("LoRA / LoRA", "lora", "lora"),
    _setting("LN / LoRA", "layernorm", "lora"),
    _setting("FT / LoRA", "full", "lora"),
    _setting("LoRA / QLoRA", "lora", "qlora"),
    _setting("LN / QLoRA", "layernorm", "qlora"),
    _setting("FT / FT", "full", "full", 1.0),
)
"""In the paper's order: how the tower learns, and how the language model does."""


@dataclass(frozen=True, order=True)
class Case:
    """One fine-tuning."""

    seed: int
    place: int
    """Of the row in `SETTINGS`."""
    ratio: float

    @property
    def setting(self) -> Setting:
        """The row."""
        return SETTINGS[self.place]

    @property
    def name(self) -> str:
        """For people and logs."""
        return f"{self.setting.name.replace('/', 'and')}, ratio {self.ratio:g}, seed {self.seed}"

    @property
    def told(self) -> dict[str, Any]:
        """What it is, for the result."""
        return {"setting": self.setting.name, "ratio": self.ratio, "seed": self.seed}


@dataclass(frozen=True)
class Design:
    """What is compared."""

    seeds: int = 3
    full_rate: float = 5e-4
    """Peak rate of a language model that is trained in full; by adapters it is that of the recipe's stage."""

    def runs(self) -> list[Case]:
        """Those with the lowest seeds first: a stop half-way leaves whole tables of fewer seeds."""
        return [
            Case(seed, place, ratio)
            for seed in range(self.seeds)
            for place, setting in enumerate(SETTINGS)
            for ratio in setting.ratios
        ]


def stages_of(recipe: Recipe) -> tuple[list[str], str]:
    """The steps that make the model to start from, and the last one, which is tuned.

    Raises:
        ConfigError: there is no stage before the last, or the last is not one that the table could change.
    """
    found = [name for name, stage in zip(STAGES, recipe.train.stages, strict=False) if stage]
    last = recipe.train.stages[STAGES.index(found[-1])]
    assert last
    where = f"train.stages.{found[-1]}"
    if len(found) < 2:
        raise ConfigError("the last stage is tuned, and none is before it to start from", where=where)
    if len(last.trainable) < 3 or "llm" not in last.adapted or last.learning_rates:
        raise ConfigError(
            "the last stage trains every part at one rate, the language model by adapters; the rest is the table's",
            where=where,
        )
    if last.pruned:
        raise ConfigError("every row trains on all samples: set `pruned: false`", where=f"{where}.pruned")
    return found[:-1], found[-1]
