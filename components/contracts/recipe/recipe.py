"""The whole recipe: one schema over its sections, and each step's part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.linears import decoder_linears, fp8_linears, no_fp8
from nvila.components.contracts.pipelines import Pipeline, pipeline_of
from nvila.components.contracts.places import is_version
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.data import SPLITS, DataSettings
from nvila.components.contracts.recipe.evaluate import EvaluateSettings, Gate
from nvila.components.contracts.recipe.model import ModelSettings
from nvila.components.contracts.recipe.prune import PruneSettings, Reference
from nvila.components.contracts.recipe.quantize import QuantizeSettings
from nvila.components.contracts.recipe.rollout import TARGETS, RegisterSettings, RolloutSettings
from nvila.components.contracts.recipe.section import MOST_CHARACTERS, Disagreement, Section
from nvila.components.contracts.recipe.train import TrainSettings
from nvila.components.contracts.steps import Step


class Needs(Section):
    """What preflight asks of the machine."""

    memory_bytes: int = Field(default=6 * 2**30, ge=0, le=2**50)
    """Memory that must be free."""
    disk_bytes: int = Field(default=2 * 2**30, ge=0, le=2**60)
    """What must be free where the store and the runs lie."""


class Recipe(Section):
    """Everything a run depends on."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", max_length=MOST_CHARACTERS)
    """What runs and the registered model are called after; that of its file where a file gives none."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of everything that is drawn. NumPy takes 32 bits."""
    model: ModelSettings
    """The shape of the model, and where its first weights come from."""
    data: DataSettings
    """What it learns from, and what records must keep."""
    prune: PruneSettings = PruneSettings()
    """Which of the SFT data stays."""
    train: TrainSettings
    """The stages, and how they are run."""
    evaluate: EvaluateSettings
    """What is measured, and what the gate asks."""
    quantize: QuantizeSettings = QuantizeSettings()
    """How it becomes smaller, and what that may cost."""
    register_: RegisterSettings = Field(alias="register")
    """Its place in the registry."""
    rollout: RolloutSettings = RolloutSettings()
    """Where and how it is served."""
    needs: Needs = Needs()
    """What preflight asks of the machine."""

    @property
    def pipeline(self) -> Pipeline:
        """The table of a run of it: one that starts from a whole model is fine-tuned."""
        return pipeline_of(self.model.base.model is not None)

    @property
    def pruned_images(self) -> list[str] | None:
        """Names of the sources of pictures that are pruned, as a stage takes what is kept of them; None without any."""
        return [name for name in self.data.images if name in self.train.pruned] or None

    @property
    def pruned_videos(self) -> list[str] | None:
        """Names of the sources of clips that are pruned; None without any."""
        return [name for name in self.data.videos if name in self.train.pruned] or None

    @property
    def references(self) -> dict[str, Reference]:
        """The reference models that pruning asks, by name; none where nothing is pruned."""
        return self.prune.references if self.train.pruned else {}

    @property
    def weights(self) -> list[str]:
        """Where weights are taken from: folders, `s3://`, `hf://`, and versions of the registry (`is_version`)."""
        base = [uri for uri in (self.model.base.vision_tower, self.model.base.llm) if uri]
        references = [one.path for one in self.references.values() if one.path]
        whole = [self.model.base.model] if self.model.base.model else []
        return [f"./{uri}" if is_version(uri) else uri for uri in base] + whole + references

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

    def model_at(self, stage: int) -> ModelSettings:
        """The model as a stage has it, counted from 0: after its changes, and those of the stages before it."""
        model = self.model
        for row in self.train.stages[: stage + 1]:
            model = row.model.of(model) if row else model
        return model

    def time_tokens_at(self, stage: int) -> int:
        """Time tokens that the vocabulary has in a stage."""
        return sum((row.model.time_tokens or 0) for row in self.train.stages[: stage + 1] if row)

    @property
    def vllm(self) -> bool:
        """Whether a step starts vLLM."""
        scored = any(one.engine == "vllm" for one in self.references.values())
        return scored or self.quantize.through_vllm or TARGETS[self.rollout.target].serves_here

    @property
    def gate(self) -> Gate:
        """What the evaluation's gate asks; where fine-tuning does not say otherwise, of every source that is drawn."""
        asked = self.evaluate.gate
        if self.model.base.model is None or asked.not_below_base is not None:
            return asked
        drawn = {subset.partition(".")[0] for stage in self.train.stages if stage for subset in stage.data}
        own = [source for source in self.evaluate.sources if source in drawn]
        return asked.model_copy(update={"not_below_base": own})

    @property
    def open_gates(self) -> str:
        """Which gates every model passes, in words; empty where they all ask something."""
        found = ["evaluate.gate (above_question_only is false, no min_accuracy)"] if self.gate.open else []
        found += ["quantize.gate (max_loss is 1)"] if self.quantize.gate.open else []
        return f"every model passes {' and '.join(found)}" if found else ""

    @model_validator(mode="before")
    @classmethod
    def _name_of_model(cls, content: Any) -> Any:
        """The registered model is called after the recipe, so that a copy under another name has its own versions."""
        if not isinstance(content, Mapping) or not isinstance(name := content.get("name"), str):
            return content
        register = content.get("register", {})
        if not isinstance(register, Mapping) or register.get("model_name") is not None:
            return content
        called = name if name.startswith("nvila-") else f"nvila-{name}"
        return {**content, "register": {**register, "model_name": called}}

    def disagreements(self) -> Iterator[Disagreement]:
        """Names mean sources that there are, and settings have an effect."""
        names = [source.name for source in self.data.sources]
        for index, stage in enumerate(self.train.stages):
            for subset in stage.data if stage else ():
                source, _, split = subset.partition(".")
                if source not in names or split not in SPLITS or split == "heldout":
                    why = f"{subset!r} is not SOURCE.SPLIT with a source of {names} and a split sft or captions"
                    yield Disagreement(f"train.stages.{index}.data", why)
        yield from self._disagreements_of_changes()
        if self.model.base.model is None:
            for name in ("not_below_base", "max_forgotten"):
                if getattr(self.evaluate.gate, name):
                    why = "no whole model is fine-tuned (model.base.model), so there is none to hold it against"
                    yield Disagreement(f"evaluate.gate.{name}", why)
        for option, used, known in (
            ("evaluate.sources", self.evaluate.sources, names),
            ("evaluate.metrics", list(self.evaluate.metrics), self.evaluate.sources),
            ("evaluate.gate.min_accuracy", list(self.evaluate.gate.min_accuracy), self.evaluate.sources),
            ("evaluate.gate.not_below_base", self.evaluate.gate.not_below_base or [], self.evaluate.sources),
            ("evaluate.gate.max_forgotten", list(self.evaluate.gate.max_forgotten), self.evaluate.sources),
            ("prune.keep_ratio_of", list(self.prune.keep_ratio_of), names),
        ):
            for name in used:
                if name not in known:
                    yield Disagreement(option, f"no source is called {name!r}; there are {known}")
        if self.train.pruned and self.prune.idle:
            idle = ", ".join(f"prune.{name}" for name in self.prune.idle)
            yield Disagreement("prune", f"method {self.prune.method} does not read {idle}: take it out (null)")
        for name in self.prune.keep_ratio_of:
            if name not in self.train.pruned:
                why = f"all of {name} stays: no stage with pruned: true draws its sft"
                yield Disagreement("prune.keep_ratio_of", why)
        yield from self._disagreements_of_models()

    def _disagreements_of_changes(self) -> Iterator[Disagreement]:
        """Of what stages make of the model."""
        model, timed = self.model, ""
        for index, stage in enumerate(self.train.stages):
            if stage is None:
                continue
            try:
                model = stage.model.of(model)
            except ValidationError as error:
                first = error.errors()[0]
                option = ".".join(map(str, ("model", *first["loc"])))
                yield Disagreement(f"train.stages.{index}.{option}", first["msg"])
                return
            if stage.model.time_tokens is None:
                continue
            option = f"train.stages.{index}.model.time_tokens"
            if timed:
                yield Disagreement(option, f"stage {timed} has added time tokens already, which mean other times")
            if not any(subset.partition(".")[0] in self.data.videos for subset in stage.data):
                yield Disagreement(option, f"stage {stage.name} draws no clips, whose times they are")
            timed = stage.name

    def _disagreements_of_models(self) -> Iterator[Disagreement]:
        """Of what is made here with what is asked of it; of published weights the steps find it out."""
        known = self.model.base.model is None
        if known and self.evaluate.max_new_tokens >= self.model.max_length_tokens:
            why = f"no room for a question: a row has {self.model.max_length_tokens} tokens (model.max_length_tokens)"
            yield Disagreement("evaluate.max_new_tokens", why, self.evaluate.max_new_tokens)
        asked = self.quantize.limit or self.evaluate.limit
        if asked and asked < self.quantize.gate.least_questions and self.quantize.limit is None:
            why = f"the gate refuses sources with fewer than {self.quantize.gate.least_questions} questions"
            yield Disagreement("quantize.gate.least_questions", f"{why}, and evaluate.limit is {asked}")
        if self.model.base.made_here and PRECISIONS[self.train.precision].fp8:
            decoder, least = self.model.base.decoder, self.train.fp8.min_features
            linears = decoder_linears(decoder.hidden, decoder.heads, decoder.kv_heads, decoder.mlp)
            if not fp8_linears(linears, least):
                yield Disagreement("train.fp8.min_features", no_fp8(linears.values(), least), least)
        if self.model.base.made_here and self.quantize.llm != "none":
            size = self.quantize.group_size
            for name in ("hidden", "mlp"):
                if (features := getattr(self.model.base.decoder, name)) % size:
                    why = f"group_size {size} does not divide model.base.decoder.{name}, which is {features}"
                    yield Disagreement("quantize.group_size", why, size)


def slices(recipe: Recipe, steps: Sequence[Step] | None = None) -> dict[str, dict[str, Any] | None]:
    """Each step's part of the recipe, by step name, for its pipeline or another table; None where the recipe leaves the
    step out.

    A step's content key depends on its slice and nothing else of the recipe.

    Raises:
        ConfigError: the recipe has more stages than the pipeline has steps for them, or a stage takes what pruning kept
            of a source whose scores its step does not read.
    """
    steps = steps or recipe.pipeline.steps
    places, stages = sum("stage" in row.recipe for row in steps), len(recipe.train.stages)
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
    scored = {row.name: _at(recipe, row.recipe["sources"]) or () for row in steps if "sources" in row.recipe}
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
