"""The model of a recipe without its weights, as far as its sizes are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import NvilaError
from nvila.components.contracts.recipe.model import DecoderSizes, ModelSettings
from nvila.components.model.shape import Shape, count


def shape_of(settings: ModelSettings, decoder: DecoderSizes | None = None) -> Shape | None:
    """Counts of a recipe's model, from modules on the meta device; None where the sizes of its weights are not known.

    With `decoder` it has one of these sizes in place of its own. Sizes come from the recipe, from a local folder's
    `config.json`, or from the published models that the names of `hf://` weights say.
    """
    from nvila.components.initialize.scratch import decoder_config, tower_config
    from nvila.components.model.config.config import model_config
    from nvila.components.model.fresh import with_decoder

    base = settings.base
    if base.vision_tower and base.llm:
        vision, llm = _named(base.vision_tower, "vision_config"), _named(base.llm)
        if vision is None or llm is None:
            return None
    else:
        vision, llm = tower_config(base.tower, settings.tile_pixels), decoder_config(base.decoder, settings)
    config = model_config(settings, vision, llm)
    return count(with_decoder(config, decoder.model_dump(exclude={"vocabulary"})) if decoder else config)


def shape_at(place: str) -> Shape | None:
    """Counts of a whole model by where it lies: a folder, or `hf://` with the name of a published variant; None where
    that does not say."""
    from nvila.components.model.checkpoint.layouts import checkpoint_root, read_native_config
    from nvila.components.model.config.variants import VARIANTS

    if "://" in place:
        name = place.rpartition("/")[2].partition("@")[0]
        return count(VARIANTS[name]) if name in VARIANTS else None
    try:
        return count(read_native_config(checkpoint_root(Path(place))))
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
