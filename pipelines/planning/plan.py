"""`nvila plan`: what a run would do, need and cost, and what it would be refused for. It makes and writes nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nvila.components.contracts.errors import ConfigError, PreflightError, Unreachable
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.gpus import GPUS, Gpu
from nvila.components.contracts.placement import Placement, work
from nvila.components.contracts.precisions import PRECISIONS
from nvila.components.contracts.recipe.recipe import Recipe, slices
from nvila.components.contracts.recipe.train import Stage
from nvila.components.contracts.site import Site
from nvila.components.contracts.steps import PREFLIGHT, STAGES
from nvila.components.kube.cluster import Cluster
from nvila.components.kube.errors import ApiError
from nvila.components.model.shape import Shape
from nvila.components.precision.products import require
from nvila.components.preflight import step as preflight
from nvila.components.preflight.checks import weights_problems
from nvila.components.tracking.redact import tell
from nvila.pipelines.commands.overrides import asked_for, remarks
from nvila.pipelines.planning import cost, fp8
from nvila.pipelines.planning import memory as states
from nvila.pipelines.planning import pruning as pruned
from nvila.pipelines.planning.checks import Finding, Need, look
from nvila.pipelines.planning.cost import Subset
from nvila.pipelines.planning.fit import Fit, fits
from nvila.pipelines.planning.hits import verdicts
from nvila.pipelines.planning.memory import Memory
from nvila.pipelines.planning.opened import Opened, open_samples
from nvila.pipelines.planning.passes import passes
from nvila.pipelines.planning.pruning import PrunePlan, Rates
from nvila.pipelines.planning.serving import ServingPlan, serving_plan
from nvila.pipelines.planning.shape import is_small, located, shape_of, stage_shapes
from nvila.pipelines.planning.speed import Speed, speed_here
from nvila.pipelines.show.as_json import refusal
from nvila.pipelines.show.watch import print_line

GB = 10**9


@dataclass(frozen=True)
class Assumptions:
    """What hours and cost are worked out from."""

    gpu: Gpu
    mfu: float
    """Share of the GPU's stated speed that training reaches."""
    gpu_hour_price: float


@dataclass(frozen=True)
class StagePlan:
    """One training stage; None is not known."""

    step: str
    gpus: int
    memory: Memory | None
    samples: int | None
    tokens: float | None
    hours: float | None
    """As the other two nothing where the store has the work already."""
    cost: float | None
    minutes_here: float | None
    """On this machine, all cores together; None where the recipe wants a GPU."""
    packing: str | None = None
    """How samples share forward passes, and why."""

    def fits(self, gpu: Gpu) -> bool | None:
        """Whether its memory fits the GPU, beside what CUDA and NCCL take."""
        return None if self.memory is None else self.memory.peak + states.RESERVE_BYTES <= gpu.memory_bytes


@dataclass(frozen=True)
class Plan:
    """Everything that is shown."""

    recipe: str
    remarks: list[str]
    """On a recipe that is right, and should be known."""
    store: Mapping[str, str]
    """By step: hit, miss, unknown or always."""
    places: dict[str, Placement]
    """By step, what its work asks of a cluster."""
    parameters: dict[str, int] | None
    stages: list[StagePlan]
    pruning: list[PrunePlan]
    """Each prune step, then both together; nothing of a pipeline without them."""
    assumptions: Assumptions
    speed_here: Speed | None
    """Of this machine, in whose minutes pruning is told where the recipe does without a GPU."""
    assumed: list[str]
    """About models whose sizes are not known."""
    here: list[str]
    """What preflight would refuse on this machine."""
    opened: list[Opened]
    """A sample of each source that is here."""
    not_asked: list[str]
    """Weights on the hub: whether they are there is found out by the run."""
    looked: str
    """Which cluster was looked at, or why none was."""
    findings: list[Finding] | None
    """About the cluster; None where none was looked at."""
    serving: ServingPlan | None = None
    """What pods take that serve the model; None where the recipe has none served by a cluster."""
    fits_at_most: list[Fit] | None = None
    """The largest micro batch of each stage; None where nobody asked."""

    @property
    def refused(self) -> bool:
        """Whether the run would be: by the cluster where there is one, else by this machine."""
        if self.findings is None:
            return bool(self.here) or any(opened.refused for opened in self.opened)
        return any(finding.refused for finding in self.findings)


def make_plan(
    recipe: str,
    overrides: Iterable[str],
    assumptions: Assumptions,
    samples: Mapping[str, int],
    *,
    runs: Path,
    store: Path,
    cluster: Cluster | None = None,
    insist: bool = False,
    fit: bool = False,
) -> Plan:
    """Work it all out; a cluster that does not answer is an error where one `insist`s on it, else a remark.

    With `fit` also the largest micro batch of each stage, which takes minutes where a GPU is here to measure it.

    Raises:
        ConfigError: the recipe or an option is wrong.
        PreflightError: the cluster does not answer.
    """
    form, asked = asked_for(recipe, overrides)  # as `nvila run` does, or the keys would not be those of a run
    checked = located(asked, runs)
    known = cost.subsets(checked.data, samples)
    shape = shape_of(checked.model)
    if shape:
        require(shape.config.llm, checked.train.run)
    small = is_small(checked, shape)
    if PRECISIONS[checked.train.precision].fp8 and not assumptions.gpu.fp8 and not small:
        raise ConfigError(
            f"{assumptions.gpu.name} has no products in FP8", where="--gpu", do="Name another, or train.precision bf16"
        )
    needs = preflight.Settings.model_validate(slices(asked)[PREFLIGHT])
    opened = open_samples(checked.data)
    here = speed_here(shape, known, store, checked.train.precision) if small and shape and known else None
    rates = Rates(assumptions.gpu, assumptions.mfu, assumptions.gpu_hour_price, here)
    found: dict[str, str] = dict(verdicts(form, store, runs))
    done = {step for step, verdict in found.items() if verdict == "hit"}
    pruning, assumed = pruned.plans(checked, known, rates, done)
    site = Site() if not small else Site(gpus_per_node=0)  # small models can do without
    looked, findings = "no cluster is configured (KUBECONFIG) or wanted: only this machine was looked at", None
    serving, _ = serving_plan(checked, shape, None)
    if cluster:
        try:
            site, findings = look(cluster, Need.of(checked, small=small), assumptions.gpu.name)
            serving, more = serving_plan(checked, shape, cluster)
            findings = sorted(findings + more, key=lambda finding: not finding.refused)
            looked = f"cluster {cluster.name}, namespace {cluster.namespace}"
        except ApiError as error:
            if insist:
                raise PreflightError(str(error)) from None
            looked = f"{error}; only this machine was looked at"
    return Plan(
        recipe=checked.name,
        remarks=remarks(recipe, checked) + preflight.remarks(needs),
        store=found,
        places={row.name: work(row, checked, site) for row in checked.pipeline.steps},
        parameters=shape.parameters if shape else None,
        stages=[
            _stage(step, stage, checked, shaped, known, rates, done)
            for step, stage, shaped in zip(STAGES, checked.train.stages, stage_shapes(checked), strict=False)
            if stage
        ],
        pruning=pruning,
        assumptions=assumptions,
        speed_here=here,
        assumed=assumed,
        here=preflight.problems(needs, runs, store, demo_can_be_built=True) + _weights(needs, runs),
        opened=opened,
        not_asked=_on_hub(needs),
        looked=looked,
        findings=findings,
        serving=serving,
        fits_at_most=fits(checked, shape, assumptions.gpu) if fit else None,
    )


def assumptions_of(gpu: str, mfu: float, gpu_hour_price: float) -> Assumptions:
    """Checked.

    Raises:
        ConfigError: an option out of its range.
    """
    if gpu not in GPUS:
        raise ConfigError("no such GPU", where="--gpu", value=gpu, do=f"Known: {', '.join(GPUS)}.")
    if not 0 < mfu <= 1:
        raise ConfigError("a share above 0 up to 1", where="--mfu", value=mfu)
    if not 0 <= gpu_hour_price < math.inf:
        raise ConfigError("a price is a number from 0", where="--gpu-hour-price", value=gpu_hour_price)
    return Assumptions(GPUS[gpu], mfu, gpu_hour_price)


def parse_samples(pairs: Iterable[str]) -> dict[str, int]:
    """`source.split=N` pairs.

    Raises:
        ConfigError: not such a pair.
    """
    found = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if not number.isdecimal():
            raise ConfigError("not SOURCE.SPLIT=NUMBER", where="--samples", value=pair)
        found[name] = int(number)
    return found


def _stage(
    step: str,
    stage: Stage,
    recipe: Recipe,
    shape: Shape | None,
    known: Mapping[str, Subset],
    rates: Rates,
    done: Collection[str],
) -> StagePlan:
    train = recipe.train
    drawn = cost.samples_of(stage, known, recipe.prune)
    samples = sum(drawn.values()) if drawn is not None else None
    if shape is None:
        return StagePlan(step, train.gpus, None, samples, None, None, None, None)
    need = states.need(recipe, stage, shape)
    if drawn is None:
        return StagePlan(step, train.gpus, need, None, None, None, None, None)
    operations, tokens = cost.stage_work(shape, stage, drawn, known)
    shares = (0.0, 0.0) if step in done else (operations, fp8.operations(shape, stage, train.run, tokens))
    effort = rates.effort(shares[0], PRECISIONS[train.precision].products, shares[1])
    hours = effort.gpu_hours / train.gpus
    packing = passes(shape, stage, train.run, drawn, known, gpu=not is_small(recipe, shape))
    return StagePlan(step, train.gpus, need, samples, tokens, hours, effort.price, effort.minutes_here, packing)


def _weights(needs: preflight.Settings, runs: Path) -> list[str]:
    """What is wrong with weights that are not on the hub: a plan does without the internet."""
    try:
        found = weights_problems((uri for uri in needs.weights if not uri.startswith("hf://")), runs)
        return found or ([] if needs.start in _on_hub(needs) else preflight.start_problems(needs, runs))
    except Unreachable as error:
        return [str(error)]


def _on_hub(needs: preflight.Settings) -> list[str]:
    return [uri for uri in needs.weights if uri.startswith("hf://")]


def as_json(plan: Plan) -> dict[str, Any]:
    """For programs: bytes, hours and counts as numbers, null where not known."""
    content = asdict(plan) | {"refused": plan.refused}
    if plan.refused:
        content |= refusal(PreflightError("the run would be refused: " + "; ".join(_reasons(plan))))
    if plan.serving:
        content["serving"]["pods"] = plan.serving.pods.model_dump(mode="json")
    for stage, record in zip(plan.stages, content["stages"], strict=True):
        if stage.memory:
            record["memory"]["peak"] = stage.memory.peak
        record["fits"] = stage.fits(plan.assumptions.gpu)
    for step, record in zip(plan.pruning, content["pruning"], strict=True):
        record |= {"pays": step.pays, "verdict": step.verdict}
    return content


def show(plan: Plan, console: Console) -> None:
    """For a person."""
    asked = [_fits(plan.fits_at_most)] if plan.fits_at_most else []
    pruning = [_pruning(plan)] if plan.pruning else []
    console.print(_steps(plan), *pruning, _memory(plan), *asked)
    for line in (*_notes(plan), "", *_refusals(plan)):
        print_line(console, tell(line))


def exit_code(plan: Plan) -> Exit:
    """2 where the run would be refused."""
    return Exit.USER if plan.refused else Exit.DONE


def _steps(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, title=f"{plan.recipe}: steps", title_justify="left")
    here = plan.speed_here is not None
    for name in ("step", "store"):
        table.add_column(name)
    for name in ("GPUs", "samples", "tokens", *(("minutes",) if here else ("hours", "cost"))):
        table.add_column(name, justify="right")

    def amounts(stages: Sequence[StagePlan]) -> list[str]:
        columns = ("minutes_here",) if here else ("hours", "cost")
        values = [[getattr(stage, column) for stage in stages] for column in columns]
        return [_number(None if None in column else sum(column), ",.1f" if here else ",.2f") for column in values]

    stages = {stage.step: stage for stage in plan.stages}
    for step in plan.store:
        if stage := stages.get(step):
            numbers = (f"{stage.gpus}", _number(stage.samples, ","), _number(stage.tokens, ",.0f"))
            table.add_row(step, plan.store[step], *numbers, *amounts([stage]))
        else:
            table.add_row(step, plan.store[step], "" if plan.places[step].gpus == "0" else plan.places[step].gpus)
    table.add_row("training", "", "", "", "", *amounts(plan.stages))
    return table


def _pruning(plan: Plan) -> Table:
    method = plan.pruning[-1].method
    table = Table(
        box=None, pad_edge=False, title=f"pruning by {method}, and what the stages save", title_justify="left"
    )
    table.add_column("step")
    here = plan.speed_here is not None
    for name in ("samples", "minutes" if here else "cost", "saved"):
        table.add_column(name, justify="right")
    table.add_column("references")
    table.add_column("")
    for step in plan.pruning:
        efforts = (step.costs, step.saves)
        amounts = [(one.minutes_here if here else one.price) if one else None for one in efforts]
        numbers = [_number(step.samples, ","), *(_number(amount, ",.1f" if here else ",.2f") for amount in amounts)]
        names = ", ".join(f"{name}: {place}" for name, place in step.references.items())
        table.add_row(step.step, *(numbers if step.sources else ("", "", "")), names, step.verdict)
    return table


def _memory(plan: Plan) -> Table:
    gpu = plan.assumptions.gpu
    title = f"memory of one GPU in GB, at most ({gpu.name}: {gpu.memory_bytes / GB:.0f})"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("stage")
    parts = ("weights", "gradients", "optimizer", "buffers", "activations", "loading", "peak")
    for name in parts:
        table.add_column(name, justify="right")
    table.add_column("")
    for stage in plan.stages:
        if stage.memory is None:
            table.add_row(stage.step, *["unknown"] * len(parts))
        else:
            sizes = [f"{getattr(stage.memory, name) / GB:.2f}" for name in parts]
            table.add_row(stage.step, *sizes, "fits" if stage.fits(gpu) else "does not fit")
    return table


def _fits(found: list[Fit]) -> Table:
    title = "largest micro batch that fits one GPU, in samples of the largest kind"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("stage")
    for name in ("recipe", "at most", "GB"):
        table.add_column(name, justify="right")
    table.add_column("")
    for one in found:
        peak = "" if one.peak_bytes is None else f"{one.peak_bytes / GB:.2f}"
        table.add_row(one.step, str(one.now), str(one.most or "none"), peak, one.how)
    return table


def _notes(plan: Plan) -> list[str]:
    given = plan.assumptions
    lines = [
        "",
        *plan.remarks,
        states.FORMULA,
        "",
        cost.FORMULA,
        *([pruned.FORMULA] if plan.pruning and plan.pruning[-1].sources else []),
        "",
    ]
    speed, gpu = plan.speed_here, given.gpu
    rate = (
        f"{speed.operations_a_second:.1e} operations a second of this machine, as {speed.evidence}"
        if speed
        else f"{gpu.name} with {gpu.bf16 / 1e12:.0f} TFLOP/s in bf16, {gpu.fp32 / 1e12:.0f} in fp32 and "
        f"{f'{gpu.fp8 / 1e12:.0f}' if gpu.fp8 else 'none'} in FP8, "
        f"MFU {given.mfu}, {given.gpu_hour_price} a GPU-hour"
    )
    lines.append(
        f"assumed: {rate}; every medium takes its most tokens; {cost.CHARACTERS_PER_TOKEN} characters a token, "
        f"{cost.TEXT_TOKENS} tokens of text where --samples gives a number. Steps other than training and pruning are "
        "not estimated; a step that the store has (hit) takes nothing"
    )
    lines += [f"assumed: {words}" for words in plan.assumed]
    lines += plan.serving.lines() if plan.serving else ()
    lines += [f"{stage.step} goes through the model {stage.packing}" for stage in plan.stages if stage.packing]
    if any(stage.samples is None for stage in plan.stages):
        lines.append("unknown: the annotation files are not here; --samples SOURCE.SPLIT=NUMBER gives their size")
    if plan.not_asked:
        lines.append(f"not looked at: {', '.join(plan.not_asked)}")
    if plan.parameters is None:
        lines.append("unknown: the sizes of the weights that model.base names")
    return lines


def _reasons(plan: Plan) -> list[str]:
    """What the run would be refused for."""
    if plan.findings is not None:
        return [finding.text for finding in plan.findings if finding.refused]
    return [*plan.here, *(opened.words for opened in plan.opened if opened.refused)]


def _refusals(plan: Plan) -> list[str]:
    lines = [f"preflight would refuse here: {problem}" for problem in plan.here] or ["this machine has what it takes"]
    lines += [f"{'validate would refuse: ' if opened.refused else ''}{opened.words}" for opened in plan.opened]
    if plan.findings is None:
        return [*lines, plan.looked]
    found = [f"  {'refused' if finding.refused else 'note'}: {finding.text}" for finding in plan.findings]
    return [*lines, f"{plan.looked}:", *(found or ["  nothing to say against the run"])]


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)
