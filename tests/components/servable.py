"""A tiny NVILA that vLLM can load (its kernels want heads of 32 and widths of 32), and media to ask it about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nvila.components.contracts.errors import PreflightError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.data.sampling import Sampling
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.fresh import init_model
from nvila.components.model.nvila import NVILA
from nvila.components.model.text.tokenizer import train_tokenizer
from nvila.components.serve.interpreter import serve_python


def _missing() -> str:
    """Why the serving environment cannot be used; empty where it can."""
    try:
        serve_python()
    except PreflightError as error:
        return str(error)
    return ""


WITH_VLLM = [pytest.mark.slow, pytest.mark.skipif(bool(_missing()), reason=_missing() or "never")]
"""Marks of tests that start the real vLLM."""
QUESTION = "Which digit is in row 2, column 1?"


def servable_model(
    *, llm: dict[str, Any] | None = None, texts: Sequence[str] = (QUESTION, "three four seven"), **changes: Any
) -> tuple[NVILA, Any]:
    """Random weights, scaled so that answers depend on the picture; `llm` changes keys of the decoder's."""
    vision = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 192,
        "image_size": 28,
        "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh",
    }
    decoder = {
        "vocab_size": 300,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        **(llm or {}),
    }
    fields: dict[str, Any] = {
        "vision": vision,
        "llm": decoder,
        "projector": "mlp_downsample",
        "vision_mode": "dynamic_s2",
        "s2_scales": (28, 56),
        "s2_output_scale": -1,
        "max_tiles": 6,
        "select_layer": -2,
        "max_length_tokens": 256,
        "sampling": Sampling(4),
        "video_pool_sizes": ((2, 1, 1),),
    }
    tokenizer = train_tokenizer(texts, decoder["vocab_size"])
    model = init_model(ModelConfig(**{**fields, **changes}), tokenizer, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
        list(model.mm_projector.parameters())[-2].mul_(8.0)
    return model, tokenizer


def picture(path: Path, seed: int, size: tuple[int, int] = (56, 56)) -> Path:
    """A PNG of random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def clip(path: Path, seed: int) -> Path:
    """An MP4 of 8 random frames."""
    import av

    random = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 56
        stream.pix_fmt = "yuv420p"
        for _ in range(8):
            frame = np.kron(random.integers(0, 256, (4, 4, 3)), np.ones((14, 14, 1))).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def manifest(step: str, folder: Path) -> Manifest:
    """A manifest of everything under a folder."""
    return Manifest(step=step, key="0" * 64, kind="model", files=describe_files(folder), folder=str(folder))


def sample_row(
    source: str, number: int, root: Path, media: str, kind: str = "image", split: str = "sft"
) -> dict[str, Any]:
    """A row of the sample table."""
    marker = "<image>" if kind == "image" else "<vila/video>"
    turns = [{"from": "human", "value": f"{marker}\n{QUESTION}"}, {"from": "gpt", "value": str(number % 10)}]
    return {
        "id": f"{source}/{split}/{number}",
        "source": source,
        "kind": kind,
        "split": split,
        "root": str(root),
        "media": [media],
        "media_sha256": [""],
        "conversations": json.dumps(turns),
        "question": QUESTION,
        "answer": str(number % 10),
        "line": number,
    }
