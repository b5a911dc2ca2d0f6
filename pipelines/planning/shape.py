"""The model of a recipe without its weights, as far as its sizes are known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.places import is_version
from nvila.components.contracts.recipe.model import Base, DecoderSizes, ModelSettings
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.model.shape import Shape, count
from nvila.components.tracking.trained import folder_of

SMALL_PARAMETERS = 10**8
"""A model of at most so many is trained without a GPU as well."""


def located(recipe: Recipe, runs: Path) -> Recipe:
    """The recipe with the folder of the registered model that it starts from, for what asks for shapes; unchanged where
    it names none, or none that is here."""
    place = recipe.model.base.model
    if place is None or not is_version(place):
        return recipe
    try:
        model = ModelSettings(base=Base(model=str(folder_of(place, runs))))
    except NvilaError:  # preflight says it
        return recipe
    return recipe.model_copy(update={"model": model})


def is_small(recipe: Recipe, shape: Shape | None) -> bool:
    """Whether the model can do without a GPU: one that is made here, or a whole one of its size."""
    base = recipe.model.base
    return base.made_here or (base.model is not None and shape is not None and shape.total <= SMALL_PARAMETERS)


def stage_shapes(recipe: Recipe) -> list[Shape | None]:
    """Of the model in each stage of the recipe, after its changes; None where the sizes are not known."""
    if place := recipe.model.base.model:
        return list(_changed(shape_at(place), recipe))
    found: list[Shape | None] = []
    last = None
    for index in range(len(recipe.train.stages)):
        now = (recipe.model_at(index), recipe.time_tokens_at(index))
        found.append(found[-1] if now == last else shape_of(now[0], time_tokens=now[1]))
        last = now
    return found


def _changed(shape: Shape | None, recipe: Recipe) -> Iterator[Shape | None]:
    """Of a whole model that each stage changes."""
    from nvila.components.model.checkpoint.changes import reconfigured
    from nvila.components.model.config.config import with_vocabulary

    for stage in recipe.train.stages:
        if stage and shape:
            config = reconfigured(shape.config, stage.model)
            if (timed := stage.model.time_tokens or 0) > config.time_tokens:
                rows = int(config.llm["vocab_size"]) + timed - config.time_tokens
                config = replace(with_vocabulary(config, rows), time_tokens=timed)
            shape = shape if config == shape.config else count(config)
        yield shape


def shape_of(settings: ModelSettings, decoder: DecoderSizes | None = None, *, time_tokens: int = 0) -> Shape | None:
    """Counts of a recipe's model, from modules on the meta device; None where the sizes of its weights are not known.

    With `decoder` it has one of these sizes in place of its own, with `time_tokens` so many rows more. Sizes come from
    the recipe, from a local folder's `config.json`, or from the published models that the names of `hf://` weights say.
    """
    from nvila.components.initialize.scratch import decoder_config, tower_config
    from nvila.components.model.config.config import model_config, with_vocabulary
    from nvila.components.model.fresh import with_decoder

    base = settings.base
    if base.model:
        return shape_at(base.model)
    if base.vision_tower and base.llm:
        vision, llm = _named(base.vision_tower, "vision_config"), _named(base.llm)
        if vision is None or llm is None:
            return None
    else:
        vision, llm = tower_config(base.tower, settings.tile_pixels), decoder_config(base.decoder, settings)
    config = model_config(settings, vision, llm)
    config = with_vocabulary(config, int(config.llm["vocab_size"]) + time_tokens)
    return count(with_decoder(config, decoder.model_dump(exclude={"vocabulary"})) if decoder else config)


def shape_at(place: str) -> Shape | None:
    """Counts of a whole model by where it lies: a folder, or `hf://` with the name of a published variant; None where
    that does not say."""
    from nvila.components.model.checkpoint.trainable import read_trainable
    from nvila.components.model.config.variants import VARIANTS

    if "://" in place:
        name = place.rpartition("/")[2].partition("@")[0]
        return count(VARIANTS[name]) if name in VARIANTS else None
    try:
        return count(read_trainable(Path(place)).config)
    except (NvilaError, OSError):
        return None


def _named(uri: str, section: str = "") -> dict[str, Any] | None:
    """Configuration of weights: of a local folder, or of a published model by its name."""
    from nvila.components.model.config import variants

    if "://" not in uri:
        path = Path(uri, "config.json")
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return content.get(section, content) if content else None
    known = {
        "siglip-so400m-patch14-448": variants.SIGLIP,
        "Qwen2.5-1.5B-Instruct": variants.QWEN_1_5B,
        "Qwen2.5-7B-Instruct": variants.QWEN_7B,
        "Qwen2.5-14B-Instruct": variants.QWEN_14B,
    }
    name = uri.rpartition("/")[2].partition("@")[0]
    return next((sizes for known_name, sizes in known.items() if name.endswith(known_name)), None)
