"""The whole recipe: one YAML, one schema. Errors carry the dotted path and the nearest right key."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, NonNegativeInt, ValidationError, model_validator

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.data import SPLITS, DataSettings
from nvila.components.contracts.recipe.evaluate import EvaluateSettings
from nvila.components.contracts.recipe.model import ModelSettings
from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.contracts.recipe.quantize import QuantizeSettings
from nvila.components.contracts.recipe.rollout import RegisterSettings, RolloutSettings
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.recipe.train import TrainSettings


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

    @model_validator(mode="after")
    def _names_agree(self) -> Recipe:
        names = [source.name for source in self.data.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"data.sources: two sources share a name: {names}")
        for index, stage in enumerate(self.train.stages):
            for subset in stage.data:
                source, _, split = subset.partition(".")
                if source not in names or split not in SPLITS or split == "heldout":
                    raise ValueError(
                        f"train.stages.{index}.data: {subset!r} is not SOURCE.SPLIT with a source of {names} "
                        "and a split sft or captions"
                    )
        for option, used, known in (
            ("evaluate.sources", self.evaluate.sources, names),
            ("evaluate.gate.min_accuracy", list(self.evaluate.gate.min_accuracy), self.evaluate.sources),
            ("prune.keep_ratio_of", list(self.prune.keep_ratio_of), names),
        ):
            for name in used:
                if name not in known:
                    raise ValueError(f"{option}: no source is called {name!r}; there are {known}")
        return self


def parse_recipe(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Check a recipe.

    Args:
        content: the YAML document.
        where: file name for messages.

    Raises:
        ConfigError: names the dotted option, the value and, for an unknown key, the nearest right one.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _explain(error, where) from None


def merge(base: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `overrides` laid over it: mappings merge key by key, anything else is replaced."""
    merged = dict(base)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def slices(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Each step's part of the recipe, by step name. A step's content key depends on its slice and nothing else."""
    r = recipe.model_dump(mode="json", by_alias=True)
    image = [s["name"] for s in r["data"]["sources"] if s["kind"] == "image"]
    video = [s["name"] for s in r["data"]["sources"] if s["kind"] == "video"]
    skips = {"max_skipped_share": r["train"]["max_skipped_share"]}
    prune = {"prune": r["prune"], "seed": r["seed"]} | skips
    run = {k: v for k, v in r["train"].items() if k != "stages"}
    evaluate = {k: v for k, v in r["evaluate"].items() if k != "gate"}
    quantize = {k: v for k, v in r["quantize"].items() if k not in ("gate", "limit", "through_vllm")}
    stages = {
        f"train-{i}": {"stage": stage, "run": run, "seed": r["seed"]} for i, stage in enumerate(r["train"]["stages"], 1)
    }
    base = r["model"]["base"]
    weights = [base["vision_tower"], base["llm"], r["prune"]["small"]["path"], r["prune"]["large"]["path"]]
    vllm = recipe.quantize.through_vllm or recipe.rollout.target == "local"
    quantized = {"evaluate": evaluate, "limit": r["quantize"]["limit"], "through_vllm": r["quantize"]["through_vllm"]}
    return {
        "preflight": {
            "data": r["data"],
            "rollout": r["rollout"],
            "needs": r["needs"],
            "vllm": vllm,
            "weights": [uri for uri in weights if uri],
        },
        "validate": {"data": r["data"]},
        "base": {"model": r["model"], "seed": r["seed"]} | skips,
        "prune-image": prune | {"sources": image},
        "prune-video": prune | {"sources": video},
        **stages,
        "evaluate": {"evaluate": evaluate, "seed": r["seed"]},
        "gate": {"gate": r["evaluate"]["gate"]},
        "quantize": {"quantize": quantize, "seed": r["seed"]} | skips,
        "evaluate-quantized": quantized,
        "gate-quantized": {"gate": r["quantize"]["gate"]},
        "register": {"register": r["register"]},
        "rollout": {"rollout": r["rollout"], "register": r["register"]},
    }


def _explain(error: ValidationError, where: str) -> ConfigError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    dotted = ".".join(path)
    others = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        if dotted == "model.variant":
            return ConfigError(f"unknown recipe key {dotted}{others}", where=where, do="It decides nothing: delete it.")
        known = _keys_at(Recipe, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"Did you mean {'.'.join([*path[:-1], near[0]])}?" if near else f"Known here: {', '.join(known)}"
        return ConfigError(f"unknown recipe key {dotted}{others}", where=where, do=hint)
    if first["type"] == "missing":
        return ConfigError(f"recipe key {dotted} is missing{others}", where=where)
    message = re.sub(r"^Value error, ", "", first["msg"])
    value = None if isinstance(first.get("input"), (dict, list)) else first.get("input")
    return ConfigError(f"{dotted or 'recipe'}: {message}{others}", where=where, value=value)


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """Names of the keys that the schema knows at a dotted path (list indices and dictionary keys are passed over)."""
    kind: Any = model
    for part in path:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
            if part not in fields:
                return []
            kind = fields[part]
        else:
            args = typing.get_args(kind)
            kind = args[-1] if args else kind
        kind = _unwrap(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return sorted(field.alias or name for name, field in kind.model_fields.items())
    return []


def _unwrap(kind: Any) -> Any:
    """`X | None` -> `X`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind
