"""What pruning costs beforehand, and what the stages save by it; both counted as the work of the stages is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from nvila.components.contracts.gpus import Gpu
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.prune import Reference
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.steps import PRUNE_IMAGE, PRUNE_VIDEO, PRUNES, STAGES
from nvila.components.model.shape import Seen, Shape
from nvila.components.model.work import forward, operations
from nvila.pipelines.planning import fp8
from nvila.pipelines.planning.cost import Subset, samples_of
from nvila.pipelines.planning.shape import shape_at, shape_of, stage_shapes
from nvila.pipelines.planning.speed import Speed

FOLDS = 2
"""Each sample is scored by a reference that learnt from the other fold."""
FITTED_MEDIA = 4096
"""Of a source, from which clusters are made."""
FORMULA = """\
pruning, in the same operations, of samples with one medium each unless the data are here to count them:
  scoring      tower once for references on one tower, projector and decoder of each; the large one twice where it is
               asked without the picture too; and as much for the held-out questions of one kind a source
  references   trained here: tower once, 3 times the rest, for every pass over captions and SFT samples
  clusters     tower once a medium, and once more for those that the clusters are made from
  saved        what the stages' samples that go would have cost; each group is taken to keep the recipe's ratio"""


@dataclass(frozen=True)
class Rates:
    """What operations are worth."""

    gpu: Gpu
    mfu: float
    gpu_hour_price: float
    here: Speed | None
    """Of this machine, where the recipe does without a GPU."""

    def effort(self, work: float, products: str, in_fp8: float = 0.0) -> Effort:
        """What so many operations take, whose matrices are multiplied in this precision, and some of them in FP8."""
        seconds = (work - in_fp8) / getattr(self.gpu, products) + in_fp8 / (self.gpu.fp8 or self.gpu.bf16)
        hours = seconds / self.mfu / 3600
        here = work / self.here.operations_a_second / 60 if self.here else None
        return Effort(hours, hours * self.gpu_hour_price, here)


@dataclass(frozen=True)
class Effort:
    """An amount of work."""

    gpu_hours: float
    price: float
    minutes_here: float | None
    """On this machine, all cores together; None where the recipe wants a GPU."""

    def __add__(self, other: Effort) -> Effort:
        here = None if self.minutes_here is None else self.minutes_here + (other.minutes_here or 0)
        return Effort(self.gpu_hours + other.gpu_hours, self.price + other.price, here)


@dataclass(frozen=True)
class PrunePlan:
    """One prune step, or all of them; None is not known."""

    step: str
    method: str
    sources: list[str]
    references: dict[str, str]
    """By name where it comes from."""
    samples: int | None
    """That are scored; all of them, as if each kind of question were one in which the references prove themselves."""
    costs: Effort | None
    saves: Effort | None

    @property
    def pays(self) -> bool | None:
        """Whether it saves more than it costs; None where nothing is pruned, or something is not known."""
        if not self.sources or self.method == "none" or self.costs is None or self.saves is None:
            return None
        if self.costs.minutes_here is not None and self.saves.minutes_here is not None:
            return self.saves.minutes_here > self.costs.minutes_here
        return self.saves.gpu_hours > self.costs.gpu_hours

    @property
    def verdict(self) -> str:
        """In words."""
        if not self.sources:
            return "does not run: no stage takes a part of it"
        if self.costs is None or self.saves is None:
            return "unknown: the sizes of data or of weights are not here"
        costs, saves, unit = _spoken(self.costs, self.saves)
        if self.method == "none":
            return (
                f"all samples stay; costs {costs} {unit}" if self.costs.gpu_hours else "all samples stay; costs nothing"
            )
        if not self.costs.gpu_hours:
            return f"costs nothing, saves {saves} {unit}" if self.saves.gpu_hours else "costs and saves nothing"
        if self.pays:
            return f"costs {costs} {unit}, saves {saves}"
        return f"costs more than it saves: {costs} against {saves} {unit}"


def plans(
    recipe: Recipe, known: Mapping[str, Subset], rates: Rates, done: Collection[str] = ()
) -> tuple[list[PrunePlan], list[str]]:
    """Each prune step of the recipe's pipeline, the last of them all together; and what was assumed of references.

    Args:
        recipe: the recipe.
        known: what is known of the data.
        rates: what operations are worth.
        done: steps whose work is there already: they cost nothing, and nothing is saved in them.
    """
    if not recipe.pipeline.rows.keys() & PRUNES:
        return [], []
    whole = shape_of(recipe.model)
    shapes, assumed = _shapes(recipe, whole)
    steps = [
        _plan(step, sources, recipe, whole, shapes, known, rates, done)
        for step, sources in ((PRUNE_IMAGE, recipe.pruned_images or []), (PRUNE_VIDEO, recipe.pruned_videos or []))
    ]
    used = [step for step in steps if step.sources]
    total = PrunePlan(
        step="pruning",
        method=recipe.prune.method,
        sources=[source for step in used for source in step.sources],
        references=_named(recipe) if used else {},
        samples=None if any(step.samples is None for step in used) else sum(step.samples or 0 for step in used),
        costs=_sum([step.costs for step in used]),
        saves=_sum([step.saves for step in used]),
    )
    return [*steps, total], assumed if used else []


def _plan(
    step: str,
    sources: list[str],
    recipe: Recipe,
    whole: Shape | None,
    shapes: Mapping[str, Shape],
    known: Mapping[str, Subset],
    rates: Rates,
    done: Collection[str],
) -> PrunePlan:
    there = all(f"{source}.sft" in known for source in sources)
    costs = saves = None
    if there and whole is not None:
        todo = [] if step in done else sources
        work = sum((_work(source, recipe, whole, shapes, known) for source in todo), 0.0)
        costs = rates.effort(work, "bf16")  # references lie in bfloat16 on a GPU
        saved = _saved(set(sources), recipe, known, done)
        saves = None if saved is None else rates.effort(saved[0], PRECISIONS[recipe.train.precision].products, saved[1])
    return PrunePlan(
        step=step,
        method=recipe.prune.method,
        sources=sources,
        references=_named(recipe) if sources else {},
        samples=sum(known[f"{source}.sft"].samples for source in sources) if there else None,
        costs=costs,
        saves=saves,
    )


def _work(source: str, recipe: Recipe, whole: Shape, shapes: Mapping[str, Shape], known: Mapping[str, Subset]) -> float:
    """Operations that the methods take for one source."""
    prune, sft = recipe.prune, known[f"{source}.sft"]
    video = sft.kind == "video"
    work = 0.0
    if "clusters" in prune.methods:
        tower = forward(whole, _seen(whole, video).load(sft.text_tokens, whole.config.max_length_tokens))[
            "vision_tower"
        ]
        work += (sft.media + min(sft.media, FITTED_MEDIA)) * tower
    if not prune.references:
        return work
    trained = [name for name, reference in prune.references.items() if reference.path is None]
    asked = (FOLDS if trained else 1) * prune.heldout_questions
    shared = False  # the tower of the references that are trained here
    for name, reference in prune.references.items():
        shape = shapes[name]
        parts = forward(shape, _seen(shape, video).load(sft.text_tokens, shape.config.max_length_tokens))
        rest = parts["mm_projector"] + parts["llm"]
        blank, judged_blank = (prune.blank, True) if name == "large" else (False, False)
        work += sft.samples * rest * (1 + blank) + asked * rest * (1 + judged_blank)
        if name not in trained or not shared:
            work += (sft.media + asked) * parts["vision_tower"]
        if name in trained:
            shared = True
            work += _training(source, reference, shape, video, known)
    return work


def _training(source: str, reference: Reference, shape: Shape, video: bool, known: Mapping[str, Subset]) -> float:
    """Operations of both folds' models: each learns from the half that the other scores, so that together all of it is
    seen once a pass."""
    work = 0.0
    for split, epochs in (("captions", reference.caption_epochs), ("sft", reference.epochs)):
        subset = known.get(f"{source}.{split}")
        if subset and epochs:
            parts = forward(shape, _seen(shape, video).load(subset.text_tokens, shape.config.max_length_tokens))
            work += subset.samples * (min(epochs, 1.0) * parts["vision_tower"])
            work += subset.samples * 3 * epochs * (parts["mm_projector"] + parts["llm"])
    return work


def _saved(
    sources: set[str], recipe: Recipe, known: Mapping[str, Subset], done: Collection[str]
) -> tuple[float, float] | None:
    """Operations of the samples that stages do not see as pruning these sources takes them away, and of them those in
    FP8."""
    work = in_fp8 = 0.0
    for step, stage, shape in zip(STAGES, recipe.train.stages, stage_shapes(recipe), strict=False):
        if stage is None or step in done or not stage.pruned or not sources.intersection(stage.tuned_on):
            continue
        everything = samples_of(stage, known, recipe.prune.model_copy(update={"method": "none"}))
        rest = samples_of(stage, known, recipe.prune)
        if everything is None or rest is None or shape is None:
            return None
        length = min(stage.max_length_tokens, shape.config.max_length_tokens)
        for name in everything:
            if name.partition(".")[0] in sources:
                subset = known[name]
                seen = _seen(shape, subset.kind == "video")
                load, gone = seen.load(subset.text_tokens, length), everything[name] - rest[name]
                work += gone * operations(shape, stage, load)
                in_fp8 += fp8.operations(shape, stage, recipe.train.run, gone * load.positions)
    return work, in_fp8


def _shapes(recipe: Recipe, whole: Shape | None) -> tuple[dict[str, Shape], list[str]]:
    """Of the references; what is not to be found out is taken to be as large as the recipe's own model."""
    found: dict[str, Shape] = {}
    assumed = []
    for name, reference in recipe.references.items():
        shape = shape_at(reference.path) if reference.path else shape_of(recipe.model, reference.decoder)
        if shape is None and whole is not None:
            assumed.append(f"prune.{name} ({reference.path}) is taken to be as large as the recipe's model")
            shape = whole
        if shape:
            found[name] = shape
    return found, assumed


def _named(recipe: Recipe) -> dict[str, str]:
    return {name: reference.path or "trained here" for name, reference in recipe.references.items()}


def _seen(shape: Shape, video: bool) -> Seen:
    return shape.video if video else shape.image


def _sum(efforts: list[Effort | None]) -> Effort | None:
    whole: Effort | None = None
    for effort in efforts:
        if effort is None:
            return None
        whole = effort if whole is None else whole + effort
    return whole


def _spoken(costs: Effort, saves: Effort) -> tuple[str, str, str]:
    """Both amounts in one unit, and the unit: minutes of this machine, or GPU hours or minutes."""
    if costs.minutes_here is not None and saves.minutes_here is not None:
        amounts, unit = (costs.minutes_here, saves.minutes_here), "minutes"
    elif max(costs.gpu_hours, saves.gpu_hours) < 1:
        amounts, unit = (60 * costs.gpu_hours, 60 * saves.gpu_hours), "GPU minutes"
    else:
        amounts, unit = (costs.gpu_hours, saves.gpu_hours), "GPU hours"
    return _rounded(amounts[0]), _rounded(amounts[1]), unit


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}" if value >= 0.1 or not value else f"{value:.1g}"
