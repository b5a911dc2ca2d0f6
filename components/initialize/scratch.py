"""A small VLM from nothing: BPE tokenizer on training texts, tower taught by labels, blank decoder and projector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.recipe.model import DecoderSizes, ModelSettings, TowerSizes
from nvila.components.contracts.results.model import Initialization
from nvila.components.data.samples import read_samples
from nvila.components.initialize.labels import tower_labels
from nvila.components.initialize.tower import read_label_records, train_tower
from nvila.components.model.checkpoint.native import save_native
from nvila.components.model.config.config import model_config
from nvila.components.model.fresh import init_model
from nvila.components.model.text.tokenizer import train_tokenizer


def make(
    settings: ModelSettings, seed: int, samples: Manifest, folder: Path, max_skipped_share: float
) -> Initialization:
    """Make the model and save it to `folder`; returns what is worth showing of it."""
    # The matrices are too small to share: the tiny tower took 87 s on two threads and 70 s on one.
    torch.set_num_threads(1)
    base = settings.base
    table = samples.path("samples.parquet")
    texts = [
        turn.text
        for split in ("captions", "sft")
        for sample in read_samples(table, split=split)
        for turn in sample.conversations
    ]
    tokenizer = train_tokenizer(texts, base.decoder.vocabulary)
    config = model_config(
        settings, tower_config(base.tower, settings.tile_pixels), decoder_config(base.decoder, settings)
    )
    model = init_model(config, tokenizer, seed)
    labels, made_of = tower_labels(samples)
    records = read_label_records(labels, settings.tile_pixels, max_skipped_share)
    tower = train_tower(
        model, records, epochs=base.tower_epochs, learning_rate=base.learning_rate, batch=base.batch, seed=seed
    )
    save_native(model, tokenizer, folder)
    return Initialization(
        parameters={
            part: sum(p.numel() for p in getattr(model, part).parameters())
            for part in ("vision_tower", "mm_projector", "llm")
        },
        vocabulary=len(tokenizer),
        label_pictures=len(records.tiles),
        labels=len(records.labels),
        labels_from=made_of,
        skipped=records.skipped,
        tower_label_accuracy=round(tower["accuracy"], 4),
        tower_steps=int(tower["steps"]),
    )


def tower_config(sizes: TowerSizes, tile_pixels: int) -> dict[str, Any]:
    """SiglipVisionConfig of a tower made from scratch."""
    return {
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.mlp,
        "patch_size": sizes.patch_pixels,
        "image_size": tile_pixels,
    }


def decoder_config(sizes: DecoderSizes, settings: ModelSettings) -> dict[str, Any]:
    """Qwen2Config of a decoder made from scratch."""
    return {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": settings.max_length_tokens,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
