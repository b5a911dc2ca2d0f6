"""Stages of the recipe `tiny` on a share of its data, and a mixture of lengths: jobs for the rows beside this file."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.recipe.train import Stage
from nvila.components.contracts.recipe.yaml12 import load_yaml
from nvila.components.train.job import Job

RECIPE = "pipelines/recipes/tiny.yaml"
SEED = 0
MIXTURE_STEPS, SHORTEST, LONGEST = 6, 32, 512
MIXTURE = {
    "name": "mixture",
    "trainable": ["vision_tower", "mm_projector", "llm"],
    "learning_rate": 5e-4,
    "batch": 64,
    "clip_norm": 1.0,
}


def tiny() -> Recipe:
    """The recipe."""
    return Recipe.model_validate(load_yaml(Path(__file__).parents[3].joinpath(RECIPE).read_text(encoding="utf-8")))


def made(folder: Path, scale: float) -> dict[str, Job]:
    """The jobs `stage 4` and `stage 5` on this share of the recipe's data, pruned by chance, with random weights."""
    from nvila.components.data.demo.build import ensure
    from nvila.components.data.samples import SAMPLES_FILE
    from nvila.components.validate import step

    recipe, tables = tiny(), folder / "tables"
    data = recipe.data.model_dump()
    data["validation"]["max_quarantined_share"] = 0.25
    data["sources"] = [
        source | {"path": str(folder / source["name"]), "demo_scale": scale} for source in data["sources"]
    ]
    settings = step.Settings.model_validate({"data": data})
    for source in settings.data.sources:
        ensure(source)
    tables.mkdir()
    step.run(settings, {}, tables)
    samples = tables / SAMPLES_FILE
    kept = _kept(samples, recipe.prune.keep_ratio, folder / "kept.parquet")
    model = _model(recipe, samples, folder / "model")
    return {
        name: Job(
            stage=recipe.train.stages[number - 1],
            run=recipe.train.run,
            seed=SEED,
            model=model,
            samples=str(samples),
            kept=[kept],
            out=str(folder / f"out {number}"),
        )
        for name, number in (("stage 4", 4), ("stage 5", 5))
    }


def mixture(folder: Path, like: Job, spread: str) -> Job:
    """Texts of 32 to 512 tokens, as many of each length (`even`) or of each length's logarithm (`log`)."""
    from nvila.components.data.samples import write_samples
    from nvila.components.model.text.tokenizer import load_tokenizer

    rng, tokenizer = random.Random(SEED), load_tokenizer(Path(like.model, "llm"), Path(like.model))
    lengths = [_length(rng, spread) for _ in range(MIXTURE_STEPS * int(str(MIXTURE["batch"])))]
    samples = folder / f"{spread}.parquet"
    write_samples(samples, [_text(number, length, tokenizer) for number, length in enumerate(lengths)])
    stage = Stage.model_validate(MIXTURE | {"data": {"texts.sft": 1}})
    out = folder / f"out {spread}"
    return like.model_copy(update={"stage": stage, "samples": str(samples), "kept": [], "out": str(out)})


def _length(rng: random.Random, spread: str) -> int:
    if spread == "even":
        return rng.randint(SHORTEST, LONGEST)
    return round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))


def _text(number: int, length: int, tokenizer: Any) -> dict[str, Any]:
    """A question and its answer, each of about half the tokens."""
    from nvila.components.data.samples import Turn
    from nvila.components.model.text.conversation import encode

    def turns(words: int) -> list[Turn]:
        asked = words // 2
        return [Turn("human", f"The{' the' * asked}"), Turn("gpt", f"The{' the' * (words - asked)}")]

    words = max(0, length - len(encode(tokenizer, turns(0)).input_ids))
    said = turns(words)
    told = [{"from": turn.role, "value": turn.text} for turn in said]
    row = {"id": f"texts/sft/{number}", "source": "texts", "kind": "image", "split": "sft", "root": "/", "line": number}
    row |= {"media": [], "media_sha256": [], "conversations": json.dumps(told), "fields": "{}"}
    return row | {"question": said[0].text, "answer": said[1].text}


def _kept(samples: Path, ratio: float, path: Path) -> str:
    """A score table that keeps this share of the questions."""
    import pyarrow
    import pyarrow.parquet

    from nvila.components.data.samples import read_samples

    ids, rng = [sample.id for sample in read_samples(samples, split="sft")], random.Random(SEED)
    columns = {"id": ids, "kept": [rng.random() < ratio for _ in ids]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def _model(recipe: Recipe, samples: Path, folder: Path) -> str:
    """The recipe's model with random weights."""
    from nvila.components.data.samples import read_samples
    from nvila.components.initialize.scratch import decoder_config, tower_config
    from nvila.components.model.checkpoint.native import save_native
    from nvila.components.model.config.config import model_config
    from nvila.components.model.fresh import init_model
    from nvila.components.model.text.tokenizer import train_tokenizer

    sizes = recipe.model.base
    texts = [
        turn.text
        for sample in read_samples(samples)
        if sample.split in ("captions", "sft")
        for turn in sample.conversations
    ]
    tokenizer = train_tokenizer(texts, sizes.decoder.vocabulary)
    tower, decoder = tower_config(sizes.tower, recipe.model.tile_pixels), decoder_config(sizes.decoder, recipe.model)
    save_native(init_model(model_config(recipe.model, tower, decoder), tokenizer, SEED), tokenizer, folder)
    return str(folder)
