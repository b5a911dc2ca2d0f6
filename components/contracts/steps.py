"""The table of steps: one row says everything that pipeline, plan, terminal, report and documents know of a step.

A new step is a row here and a folder with `step.py` and `component.py`. A pipeline is a tuple of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from nvila.components.contracts.results.accuracy import Evaluation, Passed, QuantizedEvaluation
from nvila.components.contracts.results.model import Initialization, Pruning, Quantization, Training, Validation
from nvila.components.contracts.results.result import Other, Result
from nvila.components.contracts.results.run import Ending, Preflight, Registration, Resolution, Rollout

RESOLVE, PREFLIGHT, VALIDATE, INITIALIZE = "resolve", "preflight", "validate", "initialize"
PRUNE_IMAGE, PRUNE_VIDEO = "prune-image", "prune-video"
EVALUATE, GATE = "evaluate", "gate"
QUANTIZE, EVALUATE_QUANTIZED, GATE_QUANTIZED = "quantize", "evaluate-quantized", "gate-quantized"
REGISTER, ROLLOUT, REPORT = "register", "rollout", "report"

TRACKING = ("mlflow_username", "mlflow_password", "mlflow_token")
WEIGHTS = ("s3_key", "s3_secret", "hub_token")


@dataclass(frozen=True)
class Step:
    """One step of a pipeline."""

    name: str
    """Of the task, the slice, the status file and the folder in the store."""
    folder: str
    """Below `components/`: `step.py` does the work, `component.py` holds the wrapper, a function of this name."""
    about: str
    """What it does, for the README."""
    remark: str
    """The same in a few words, for the report's picture and the boxes of KFP's."""
    output: str
    """Name of the artifact that its manifest is, as KFP's UI shows it."""
    recipe: Mapping[str, str] = field(default_factory=dict)
    """Its part of the recipe: field of the step's `Settings` -> where the recipe has it, as `train.stages.3`."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Name of each input -> the step whose output it is."""
    after: tuple[str, ...] = ()
    """Further steps to wait for, of which it reads nothing."""
    hands_on: str = ""
    """The input that goes on in its place where the recipe leaves the step out (a slice that is null)."""
    image: Literal["main", "quantize"] = "main"
    size: Literal["small", "cpus", "memory", "gpu", "gpus", "node"] = "small"
    """What its work takes on a cluster."""
    job: bool = False
    """Whether a launcher may move the work into a training job."""
    quick: bool = False
    """Whether its pod has little to do, so that one which lives on is stuck."""
    always: bool = False
    """Acts on the world, or describes this very run: never skipped."""
    compared: bool = False
    """Lets a model go further: its inputs must be those that MLflow knows."""
    at_exit: bool = False
    """Runs last, whatever became of the others."""
    secrets: tuple[str, ...] = TRACKING
    """The fields of `Environment` that it reads of a cluster's Secret: its pod gets no other key."""
    result: type[Result] = Other
    """What its manifest tells."""

    @property
    def module(self) -> str:
        """Dotted name of the module with the step's function."""
        return f"nvila.components.{self.folder}.step"

    @property
    def before(self) -> set[str]:
        """The steps that it waits for."""
        return {*self.inputs.values(), *self.after}


def _prune(name: str, sources: str, about: str, remark: str) -> Step:
    return Step(
        name=name,
        folder="prune",
        about=about,
        remark=remark,
        output="kept",
        result=Pruning,
        recipe={
            "prune": "prune",
            "sources": sources,
            "seed": "seed",
            "max_skipped_share": "train.max_skipped_share",
        },
        inputs={"samples": VALIDATE, "model": INITIALIZE},
        hands_on="samples",
        size="gpus",
        job=True,
        secrets=(*TRACKING, *WEIGHTS),
    )


def _train(number: int, about: str, remark: str, **kept: str) -> Step:
    return Step(
        name=f"train-{number}",
        folder="train",
        about=about,
        remark=remark,
        output="trained",
        result=Training,
        recipe={"stage": f"train.stages.{number - 1}", "run": "train.run", "seed": "seed"},
        inputs={"model": f"train-{number - 1}" if number > 1 else INITIALIZE, "samples": VALIDATE, **kept},
        hands_on="model",
        size="node",
        job=True,
    )


_STAGES = (
    _train(1, "projector initialisation", "projector initialisation"),
    _train(2, "vision-encoder pre-training", "vision-encoder pre-training"),
    _train(3, "token-processor pre-training", "token-processor pre-training"),
    _train(
        4,
        "image instruction tuning, on what pruning kept",
        "image instruction tuning",
        kept_image=PRUNE_IMAGE,
    ),
    _train(
        5,
        "video instruction tuning, on what pruning kept",
        "video instruction tuning",
        kept_image=PRUNE_IMAGE,
        kept_video=PRUNE_VIDEO,
    ),
)

STEPS = (
    Step(
        name=RESOLVE,
        folder="resolve",
        about="checks the recipe and cuts it into one slice per step",
        remark="recipe to slices",
        output="slices",
        result=Resolution,
        quick=True,
        secrets=(*TRACKING, "s3_key", "s3_secret"),
    ),
    Step(
        name=PREFLIGHT,
        folder="preflight",
        about="demonstration data; then memory, disk, versions, data files and port, before anything long starts",
        remark="is everything there?",
        output="checks",
        result=Preflight,
        recipe={
            "data": "data",
            "rollout": "rollout",
            "registered": "register_.model_name",
            "needs": "needs",
            "vllm": "vllm",
            "weights": "weights",
            "start": "model.base.model",
            "drawn": "drawn",
            "train": "train",
            "prune": "prune",
            "evaluate": "evaluate",
            "quantize": "quantize",
        },
        after=(RESOLVE,),
        quick=True,
        secrets=(*TRACKING, *WEIGHTS),
    ),
    Step(
        name=VALIDATE,
        folder="validate",
        about="every record of every source against Great Expectations; spoilt ones go to quarantine with a reason",
        remark="data checked, spoilt records out",
        output="samples",
        result=Validation,
        recipe={"data": "data"},
        after=(PREFLIGHT,),
        size="cpus",
    ),
    Step(
        name=INITIALIZE,
        folder="initialize",
        about="the model that stage 1 starts from: published weights, or a small one made here",
        remark="first weights",
        output="model",
        result=Initialization,
        recipe={"model": "model", "seed": "seed", "max_skipped_share": "train.max_skipped_share"},
        inputs={"samples": VALIDATE},
        size="memory",
        secrets=(*TRACKING, *WEIGHTS),
    ),
    _prune(
        PRUNE_IMAGE,
        "pruned_images",
        "scores of the image SFT data by the recipe's method (DeltaLoss or another); the best of each group stay",
        "pruning, image sources",
    ),
    _prune(PRUNE_VIDEO, "pruned_videos", "the same for the video SFT data", "pruning, video sources"),
    *_STAGES,
    Step(
        name=EVALUATE,
        folder="evaluate",
        about="scores on held-out data, before training and after every stage, beside question-only baselines",
        remark="held-out accuracy",
        output="metrics",
        result=Evaluation,
        recipe={"evaluate": "evaluate.tasks", "seed": "seed"},
        inputs={"model": _STAGES[-1].name, "samples": VALIDATE},
        size="gpu",
        job=True,
    ),
    Step(
        name=GATE,
        folder="gate",
        about="stops a model that did not learn (exit code 3)",
        remark="good enough?",
        output="passed",
        result=Passed,
        recipe={"gate": "gate"},
        inputs={"metrics": EVALUATE},
        quick=True,
        compared=True,
    ),
    Step(
        name=QUANTIZE,
        folder="quantize",
        about="vision tower to W8A8, language model to W4A16, one compressed-tensors checkpoint",
        remark="W8A8 tower, W4A16 language model",
        output="quantized",
        result=Quantization,
        recipe={"quantize": "quantize.scheme", "seed": "seed", "max_skipped_share": "train.max_skipped_share"},
        inputs={"model": _STAGES[-1].name, "samples": VALIDATE},
        after=(GATE,),
        image="quantize",
        size="gpu",
    ),
    Step(
        name=EVALUATE_QUANTIZED,
        folder="evaluate_quantized",
        about="the same questions to the quantized model, through vLLM",
        remark="accuracy once more",
        output="quantized_metrics",
        result=QuantizedEvaluation,
        recipe={"evaluate": "evaluate.tasks", "limit": "quantize.limit", "through_vllm": "quantize.through_vllm"},
        inputs={"model": QUANTIZE, "metrics": EVALUATE, "samples": VALIDATE},
        image="quantize",
        size="gpu",
    ),
    Step(
        name=GATE_QUANTIZED,
        folder="gate",
        about="stops a model that quantization harmed (exit code 3)",
        remark="still good enough?",
        output="passed",
        result=Passed,
        recipe={"gate": "quantize.gate"},
        inputs={"metrics": EVALUATE_QUANTIZED},
        quick=True,
        compared=True,
    ),
    Step(
        name=REGISTER,
        folder="register",
        about="a version in the MLflow registry with metrics, card, lineage and pinned prompts",
        remark="version in the registry",
        output="version",
        result=Registration,
        recipe={"register": "register_"},
        inputs={
            "model": QUANTIZE,
            "metrics": EVALUATE_QUANTIZED,
            "full": EVALUATE,
            "samples": VALIDATE,
            "gate": GATE_QUANTIZED,
        },
        always=True,
        compared=True,
    ),
    Step(
        name=ROLLOUT,
        folder="rollout",
        about="serves the version, asks it the pinned prompts, moves the alias `champion`",
        remark="serve, ask, promote",
        output="promotion",
        secrets=(*TRACKING, "api_key"),
        result=Rollout,
        recipe={"rollout": "rollout"},
        inputs={"version": REGISTER, "model": QUANTIZE, "metrics": EVALUATE_QUANTIZED, "samples": VALIDATE},
        image="quantize",
        always=True,
        compared=True,
    ),
    Step(
        name=REPORT,
        folder="report",
        about="one self-contained HTML page; written for rejected and failed runs too",
        remark="written last, whatever happened",
        result=Ending,
        output="summary",
        secrets=(*TRACKING, "webhook_url", "webhook_secret"),
        quick=True,
        always=True,
        at_exit=True,
    ),
)
"""The pipeline `lifecycle`, in the order in which a person reads it: each step behind those that it waits for."""

ROWS = {row.name: row for row in STEPS}
STAGES = tuple(row.name for row in STEPS if row.folder == "train")
PRUNES = tuple(row.name for row in STEPS if row.folder == "prune")


def result_type(step: str) -> type[Result]:
    """The type of a step's result."""
    return ROWS[step].result if step in ROWS else Other


def nearest(steps: Iterable[Step] = STEPS) -> dict[str, tuple[str, ...]]:
    """Of each step those that it waits for, less those that these wait for themselves; in the table's order."""
    behind: dict[str, set[str]] = {}  # everything that has to be over before the step
    found = {}
    for row in steps:
        behind[row.name] = row.before.union(*(behind[name] for name in row.before))
        implied = set().union(*(behind[name] for name in row.before))
        found[row.name] = tuple(name for name in behind if name in row.before - implied)
    return found
