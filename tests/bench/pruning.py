"""What scoring by two references costs beside scoring one sample at a time, the losses compared first; and the memory
of a choice among many samples beside a list of them.

On a CPU with models of the size of `tiny`'s references; on a GPU also with those of NVILA-Lite-2B and NVILA-8B, whose
weights are random: they cost what trained ones do.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from model_rows.measure import Measured, apart

from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.data.media import Limits
from nvila.components.data.samples import Sample, Turn, read_samples, sample_batches, sample_schema
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.config.variants import QWEN_1_5B, VARIANTS
from nvila.components.model.device import default_device, use_flash_attention
from nvila.components.model.feed import Feed
from nvila.components.model.fresh import init_model, resized_decoder
from nvila.components.model.text.tokenizer import train_tokenizer
from nvila.components.prune.composition import makeup
from nvila.components.prune.decide import BLANK
from nvila.components.prune.groups import Grouping
from nvila.components.prune.scoring import Panel, answer_losses
from nvila.components.prune.table import Table
from nvila.components.prune.work import SHARD_SAMPLES

QUESTIONS = ("Is there a red shape in the image?", "What is written on the plate?", "How many are there?")
ANSWERS = ("yes", "AB 123 four seven", "3", "a long answer that goes on for some words until it ends")
SAMPLES_PER_PICTURE = 4
Models = dict[str, tuple[Any, Any]]


def rows() -> Iterator[Measured]:
    """Samples a second of both."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        samples = _samples(Path(folder), 256, (56, 56))
        yield _row("two references of tiny's size, float32", _tiny(), samples, off=1e-4)
        if torch.cuda.is_available():
            pictures = _samples(Path(folder), 64, (1024, 768))
            yield _row("two references of 1.5B and 7B, one tower, bfloat16", _large(), pictures, off=None)
        yield _choice(Path(folder), 500_000)


def _choice(folder: Path, count: int) -> Measured:
    """Groups, selection and composition of so many samples, in a process of its own."""
    table = _table(folder, count)
    work = f"a random half of {count:,} samples within questions and answers: memory"
    listed, chosen = apart(lambda: read_samples(table, split="sft")), apart(lambda: _chosen(table, folder))
    baseline = f"reading them into a list ({listed[0]:.0f} s; ours {chosen[0]:.0f} s)"
    return work, "MiB", listed[1], chosen[1], baseline, 5.0


def _chosen(table: Path, folder: Path) -> None:
    prune = PruneSettings(method="random", within=["question", "answer-kind", "answer"])

    def rows() -> Iterator[Any]:
        return sample_batches(table, SHARD_SAMPLES, split="sft", sources=["s"])

    known = Table.of(rows(), Grouping.fit(rows, prune, 0))
    known.decide((), prune, 0)
    known.groups()
    assert known.decision is not None
    makeup(rows(), known.decision.kept, Limits())
    known.write(rows(), folder / "scores.parquet")


def _table(folder: Path, count: int) -> Path:
    """A sample table of questions about pictures that are not there."""
    import pyarrow.parquet as parquet

    path, schema = folder / "samples.parquet", sample_schema()
    with parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, count, 50_000):
            made = [_record(folder, number) for number in range(first, min(first + 50_000, count))]
            writer.write_table(pyarrow.Table.from_pylist(made, schema=schema))
    return path


def _record(folder: Path, number: int) -> dict[str, Any]:
    question, answer = f"{QUESTIONS[number % 3]} {number % 997}", ANSWERS[number % len(ANSWERS)]
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    named = {"id": f"s/sft/{number:09d}", "source": "s", "kind": "image", "split": "sft", "root": str(folder)}
    return named | {
        "media": [f"{number // SAMPLES_PER_PICTURE:09d}.png"],
        "media_sha256": [""],
        "conversations": json.dumps(turns),
        "question": question,
        "answer": answer,
        "fields": "{}",
        "line": number,
    }


def _row(what: str, models: Models, samples: list[Sample], off: float | None) -> Measured:
    """Both ways score the same samples; a warm-up of each comes first."""
    apart, together = _alone(models, samples[:8]), _together(models, samples[:8])
    differences = [
        abs(apart[name][one] - together[name][one]) for name in models for one in (sample.id for sample in samples[:8])
    ]
    assert off is None or max(differences) <= off, f"losses differ by {max(differences)}"
    seconds = [_seconds(lambda: _alone(models, samples)), _seconds(lambda: _together(models, samples))]
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB at most" if torch.cuda.is_available() else ""
    work = f"scoring by {what}: losses within {max(differences):.1e}, {len(samples) / seconds[1]:.0f} samples/s{memory}"
    return work, "s", seconds[0], seconds[1], "each sample and reference by itself", 3.0


def _alone(models: Models, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, (model, tokenizer) in models.items():
        for sample in samples:
            (batch,) = Feed(tokenizer, model.config).batches([sample], 1)
            found.setdefault(name, {})[sample.id] = answer_losses(model, batch)[0].nats
    return found


def _together(models: Models, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for scored in Panel(models).score(samples):
        assert not scored.skipped and BLANK not in scored.losses
        for name, losses in scored.losses.items():
            found.setdefault(name, {}).update({one: loss.nats for one, loss in losses.items()})
    return found


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _samples(folder: Path, count: int, size: tuple[int, int]) -> list[Sample]:
    """Several questions about each picture, of different lengths."""
    from PIL import Image

    made, random = [], np.random.default_rng(0)
    for number in range(count):
        media = f"{size[0]}-{number // SAMPLES_PER_PICTURE}.png"
        if number % SAMPLES_PER_PICTURE == 0:
            Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(folder / media)
        question, answer = QUESTIONS[number % len(QUESTIONS)], ANSWERS[number % len(ANSWERS)]
        turns = (Turn("human", f"<image>\n{question}"), Turn("gpt", answer))
        made.append(Sample(f"s/sft/{number}", "s", "image", "sft", folder, (media,), turns, question, answer))
    return made


def _tiny() -> Models:
    vision = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 192}
    vision |= {"image_size": 28, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh"}
    llm: dict[str, Any] = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    llm |= {"num_key_value_heads": 2, "intermediate_size": 256, "max_position_embeddings": 512, "rope_theta": 1e4}
    llm |= {"tie_word_embeddings": True}
    config = replace(VARIANTS["NVILA-8B"], vision=vision, llm=llm, s2_scales=(28, 56), max_tiles=6)
    return _pair(config, {"hidden": 64, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 128}, torch.float32)


def _large() -> Models:
    small = {"hidden": 1536, "layers": 28, "heads": 12, "kv_heads": 2, "mlp": 8960}
    assert small["hidden"] == QWEN_1_5B["hidden_size"]
    return _pair(VARIANTS["NVILA-8B"], small, torch.bfloat16)


def _pair(config: ModelConfig, small: dict[str, int], dtype: torch.dtype) -> Models:
    """The configuration's model, and one with the same tower and a smaller decoder."""
    tokenizer = train_tokenizer([*QUESTIONS, *ANSWERS], 512 if dtype == torch.bfloat16 else 300)
    device = default_device()
    with torch.device(device):
        large = init_model(config, tokenizer, seed=0)
        models = {"large": large, "small": resized_decoder(large, small, seed=1)}
    found = {}
    for name, model in models.items():
        found[name] = (model.to(device, dtype).eval(), tokenizer)
        use_flash_attention(model)
    return found
