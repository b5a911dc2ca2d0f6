"""The whole recipe: one schema over its sections, and each step's part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, NonNegativeInt, model_validator
from pydantic_core import to_jsonable_python

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.places import is_version
from nvila.components.contracts.recipe.data import SPLITS, DataSettings
from nvila.components.contracts.recipe.evaluate import EvaluateSettings
from nvila.components.contracts.recipe.model import ModelSettings
from nvila.components.contracts.recipe.prune import PruneSettings, Reference
from nvila.components.contracts.recipe.quantize import QuantizeSettings
from nvila.components.contracts.recipe.rollout import TARGETS, RegisterSettings, RolloutSettings
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.recipe.train import TrainSettings
from nvila.components.contracts.steps import STEPS, Step


class Needs(Section):
    """What preflight asks of the machine."""

    memory_bytes: NonNegativeInt = 6 * 2**30
    disk_bytes: NonNegativeInt = 2 * 2**30


class Recipe(Section):
    """Everything a run depends on."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    seed: int = 0
    model: ModelSettings
    data: DataSettings
    prune: PruneSettings = PruneSettings()
    train: TrainSettings
    evaluate: EvaluateSettings
    quantize: QuantizeSettings = QuantizeSettings()
    register_: RegisterSettings = Field(default=RegisterSettings(), alias="register")
    rollout: RolloutSettings = RolloutSettings()
    needs: Needs = Needs()

    @property
    def pruned_images(self) -> list[str]:
        """Names of the sources of pictures that are pruned, as a stage takes what is kept of them."""
        return [name for name in self.data.images if name in self.train.pruned]

    @property
    def pruned_videos(self) -> list[str]:
        """Names of the sources of clips that are pruned."""
        return [name for name in self.data.videos if name in self.train.pruned]

    @property
    def references(self) -> dict[str, Reference]:
        """The reference models that pruning asks, by name; none where nothing is pruned."""
        return self.prune.references if self.train.pruned else {}

    @property
    def weights(self) -> list[str]:
        """Where weights are taken from: folders, `s3://`, `hf://`, and versions of the registry (`is_version`)."""
        base = [uri for uri in (self.model.base.vision_tower, self.model.base.llm) if uri]
        references = [one.path for one in self.references.values() if one.path]
        return [f"./{uri}" if is_version(uri) else uri for uri in base] + references

    @property
    def drawn(self) -> dict[str, dict[str, list[str]]]:
        """What draws samples: by source and split, in words."""
        found: dict[str, dict[str, list[str]]] = {}
        for number, stage in enumerate(self.train.stages, 1):
            for subset in stage.data if stage else ():
                source, _, split = subset.partition(".")
                found.setdefault(source, {}).setdefault(split, []).append(f"stage {number}")
        for source in self.evaluate.sources:
            found.setdefault(source, {})["heldout"] = ["the evaluation"]
        return found

    @property
    def vllm(self) -> bool:
        """Whether a step starts vLLM."""
        scored = any(one.engine == "vllm" for one in self.references.values())
        return scored or self.quantize.through_vllm or TARGETS[self.rollout.target].serves_here

    @model_validator(mode="after")
    def _names_agree(self) -> Recipe:
        names = [source.name for source in self.data.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"data.sources: two sources share a name: {names}")
        for index, stage in enumerate(self.train.stages):
            for subset in stage.data if stage else ():
                source, _, split = subset.partition(".")
                if source not in names or split not in SPLITS or split == "heldout":
                    raise ValueError(
                        f"train.stages.{index}.data: {subset!r} is not SOURCE.SPLIT with a source of {names} "
                        "and a split sft or captions"
                    )
        for option, used, known in (
            ("evaluate.sources", self.evaluate.sources, names),
            ("evaluate.metrics", list(self.evaluate.metrics), self.evaluate.sources),
            ("evaluate.gate.min_accuracy", list(self.evaluate.gate.min_accuracy), self.evaluate.sources),
            ("prune.keep_ratio_of", list(self.prune.keep_ratio_of), names),
        ):
            for name in used:
                if name not in known:
                    raise ValueError(f"{option}: no source is called {name!r}; there are {known}")
        if self.train.pruned and self.prune.idle:
            idle = ", ".join(f"prune.{name}" for name in self.prune.idle)
            raise ValueError(f"prune: method {self.prune.method} does not read {idle}: take it out (null)")
        for name in self.prune.keep_ratio_of:
            if name not in self.train.pruned:
                raise ValueError(f"prune.keep_ratio_of: all of {name} stays: no stage with pruned: true draws its sft")
        return self


def slices(recipe: Recipe, steps: Sequence[Step] = STEPS) -> dict[str, dict[str, Any] | None]:
    """Each step's part of the recipe, by step name; None where the recipe leaves the step out.

    A step's content key depends on its slice and nothing else of the recipe.

    Raises:
        ConfigError: the recipe has more stages than the pipeline has steps for them, or a stage takes what pruning kept
            of a source whose scores its step does not read.
    """
    places, stages = sum(bool(row.hands_on) for row in steps), len(recipe.train.stages)
    if stages > places:
        raise ConfigError(
            f"the recipe has {stages} stages, and this pipeline has training steps for {places}",
            where="train.stages",
            do="Leave stages out, or use a pipeline whose table has a row for each.",
        )
    _scores_are_read(recipe, steps)
    return {row.name: _slice(recipe, row) for row in steps if row.recipe}


def _scores_are_read(recipe: Recipe, steps: Sequence[Step]) -> None:
    """Of every source that a stage takes pruned: it waits only for the prune steps that its row names."""
    scored = {row.name: _at(recipe, row.recipe["sources"]) for row in steps if "sources" in row.recipe}
    stages = [row for row in steps if "stage" in row.recipe]
    reads = {row.name: {source for step in row.inputs.values() for source in scored.get(step, ())} for row in stages}
    for row in stages:
        stage = _at(recipe, row.recipe["stage"])
        for source in stage.tuned_on if stage and stage.pruned else ():
            if source not in reads[row.name]:
                others = [name for name in reads if source in reads[name]]
                raise ConfigError(
                    f"{row.name} reads no scores of {source}, of which it would take what pruning kept",
                    where=f"{row.recipe['stage']}.pruned",
                    do=f"Draw {source}.sft in {' or '.join(others) or 'no stage'}, or leave `pruned` out here.",
                )


def _slice(recipe: Recipe, row: Step) -> dict[str, Any] | None:
    found = {field: _at(recipe, path) for field, path in row.recipe.items()}
    return None if row.hands_on and None in found.values() else to_jsonable_python(found, by_alias=True)


def _at(recipe: Recipe, path: str) -> Any:
    """What stands at a dotted path; None behind the end of a list."""
    value: Any = recipe
    for part in path.split("."):
        value = next(iter(value[int(part) :]), None) if part.isdigit() else getattr(value, part)
    return value
