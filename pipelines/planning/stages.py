"""`nvila plan --stages`: the table of the training stages, with what follows from each row and is not written in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.train import Stage
from nvila.components.contracts.steps import STAGES
from nvila.components.model.learning import trained
from nvila.components.model.shape import Shape
from nvila.components.tracking.redact import tell
from nvila.pipelines.commands.overrides import asked_for
from nvila.pipelines.planning import cost
from nvila.pipelines.planning.cost import Subset
from nvila.pipelines.planning.shape import located, stage_shapes
from nvila.pipelines.show.watch import print_line

ESTIMATE = (
    "samples: of data whose annotation files are here or whose size --samples gives; of what is pruned the recipe's "
    "ratio. tokens: an estimate, in which every medium takes its most, "
    f"and {cost.CHARACTERS_PER_TOKEN} characters are a token ({cost.TEXT_TOKENS} tokens of text a sample where only "
    "its number is known). A stage is one pass over its samples, as many whole batches as they fill"
)


@dataclass(frozen=True)
class StageRow:
    """One stage; None is not known."""

    step: str
    name: str
    trainable: dict[str, float]
    """Peak learning rate of each part that learns."""
    trained_parameters: int | None
    """Of these parts by their methods, rows of new tokens included."""
    methods: dict[str, str]
    """How each of them learns."""
    batch: int
    micro_batch: int
    passes: int
    """Forward passes of each GPU for an optimizer step."""
    gpus: int
    samples: int | None
    tokens: float | None
    """That the decoder sees: an estimate."""
    steps: int | None
    weight_decay: float
    clip_norm: float | None
    warmup_ratio: float
    max_length_tokens: int | None
    """Longest row: the stage's limit, or the model's where that is less."""
    frames: int | None
    """Of a clip, at most where the model has a rate."""
    pool_sizes: list[tuple[int, int, int]] | None
    time_tokens: int | None
    """In the vocabulary."""


def table(
    recipe: str, overrides: Iterable[str], samples: Mapping[str, int], runs: Path = Path("runs")
) -> list[StageRow]:
    """The rows of a recipe; `runs` has the registry of what it may start from.

    Raises:
        ConfigError: the recipe or an option is wrong.
    """
    _, checked = asked_for(recipe, overrides)
    checked = located(checked, runs)
    return rows(checked, cost.subsets(checked.data, samples))


def rows(recipe: Recipe, known: Mapping[str, Subset]) -> list[StageRow]:
    """The rows of a recipe whose data are known so far."""
    found = []
    for index, (step, shape) in enumerate(zip(STAGES, stage_shapes(recipe), strict=False)):
        if (stage := recipe.train.stages[index]) is None:
            continue
        gpus = recipe.train.gpus
        drawn = cost.samples_of(stage, known, recipe.prune)
        number, micro = None if drawn is None else sum(drawn.values()), stage.samples_at_once(gpus)
        found.append(
            StageRow(
                step=step,
                name=stage.name,
                trainable={part: stage.rate(part) for part in stage.trainable},
                trained_parameters=sum(trained(shape, stage).values()) if shape else None,
                methods=dict(stage.learning),
                batch=stage.batch,
                micro_batch=micro,
                passes=stage.batch // (micro * gpus),
                gpus=gpus,
                samples=number,
                tokens=None if shape is None or drawn is None else cost.stage_work(shape, stage, drawn, known)[1],
                steps=None if number is None else number // stage.batch,
                weight_decay=stage.weight_decay,
                clip_norm=stage.clip_norm,
                warmup_ratio=stage.warmup_ratio,
                **_of_model(recipe, index, shape, stage),
            )
        )
    return found


def _of_model(recipe: Recipe, index: int, shape: Shape | None, stage: Stage) -> dict[str, Any]:
    """What the model brings to a row: by the recipe, or by a whole one that it starts from, as far as that is known."""
    if recipe.model.base.model is None:
        model = recipe.model_at(index)
        length, video, timed = model.max_length_tokens, model.video, recipe.time_tokens_at(index)
        frames, pools = video.frames, list(video.pool_sizes)
    elif shape is None:
        return dict.fromkeys(("max_length_tokens", "frames", "pool_sizes", "time_tokens"))
    else:
        config = shape.config
        length, frames, pools = config.max_length_tokens, config.sampling.frames, list(config.video_pool_sizes)
        timed = config.time_tokens
    longest = min(stage.max_length_tokens, length)
    return {"max_length_tokens": longest, "frames": frames, "pool_sizes": pools, "time_tokens": timed}


def as_json(found: Iterable[StageRow]) -> dict[str, Any]:
    """For programs: null where not known."""
    return {"stages": [asdict(row) for row in found], "remark": ESTIMATE}


def show(recipe: str, found: Iterable[StageRow], console: Console) -> None:
    """For a person: a column for each stage."""
    found = list(found)
    shown = Table(box=None, pad_edge=False, title=f"{recipe}: stages", title_justify="left")
    for head in ("", *(row.step for row in found)):
        shown.add_column(head, overflow="fold")
    lines = [_words(row) for row in found]
    for name in lines[0]:
        shown.add_row(name, *(line[name] for line in lines))
    console.print(shown)
    print_line(console, "")
    print_line(console, tell(ESTIMATE))


def _words(row: StageRow) -> dict[str, str]:
    return {
        "name": row.name,
        "learning rate": "\n".join(f"{part} {rate:g}" for part, rate in row.trainable.items()),
        "learns by": "\n".join(f"{part} {method}" for part, method in row.methods.items()),
        "trained parameters": _number(row.trained_parameters),
        "batch": f"{row.batch:,}",
        "micro batch x passes x gpus": f"{row.micro_batch} x {row.passes} x {row.gpus}",
        "samples": _number(row.samples),
        "tokens, estimated": _number(row.tokens),
        "steps": _number(row.steps),
        "weight decay": f"{row.weight_decay:g}",
        "clip norm": "none" if row.clip_norm is None else f"{row.clip_norm:g}",
        "warm-up": f"{row.warmup_ratio:g} of the steps",
        "longest row": f"{_number(row.max_length_tokens)} tokens",
        "frames, pooling": f"{_number(row.frames)}, {_pools(row.pool_sizes)}",
        "time tokens": "none" if row.time_tokens == 0 else _number(row.time_tokens),
    }


def _pools(sizes: list[tuple[int, int, int]] | None) -> str:
    return "unknown" if sizes is None else " and ".join("x".join(map(str, pool)) for pool in sizes)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.0f}"
