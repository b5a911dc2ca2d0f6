"""Reference VLMs: loaded, or trained here on one fold to score the other. Each runs in a process of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from nvila.components.contracts.errors import DataError, TrainingError
from nvila.components.contracts.manifest import write_atomic
from nvila.components.contracts.progress import Progress
from nvila.components.contracts.recipe.prune import Reference
from nvila.components.contracts.recipe.section import Section
from nvila.components.contracts.sealed import seal
from nvila.components.data.fetch import fetch_version
from nvila.components.data.mixture import draw
from nvila.components.data.samples import Sample, read_samples
from nvila.components.data.skipped import Skipped, Tally
from nvila.components.metrics.accuracy import is_correct
from nvila.components.metrics.answers import Questions, answers
from nvila.components.model.checkpoint import load_native
from nvila.components.model.device import default_device
from nvila.components.model.feed import Feed
from nvila.components.model.nvila import NVILA, resized_decoder, token_logprobs

FOLDS = 2
BATCH_SCORED = 128


class Work(Section):
    """What one reference process does."""

    name: str
    """`small` or `large`."""
    reference: Reference
    fold: int | None
    """The fold that is scored; the model is trained on the others. None scores everything with a given checkpoint."""
    base: str
    """Native checkpoint whose tower and tokenizer a reference that is trained here starts from."""
    samples: str
    sources: list[str]
    heldout_limit: int
    seed: int
    max_skipped_share: float = 0.01
    """Of the samples, on all folds."""
    out: str
    """Result file: losses per sample id, held-out accuracy per source, samples that were skipped, the version of a
    fetched checkpoint."""

    @property
    def record(self) -> Path:
        """Digest of the result file; without it the file is not believed."""
        return Path(self.out).with_suffix(".sealed.json")


def work(job: Work) -> None:
    """Make the reference, measure it on held-out questions, score its fold, write the result and seal it."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    what = job.name if job.fold is None else f"{job.name} reference, fold {job.fold}"
    samples = read_samples(Path(job.samples), split="sft", sources=job.sources)
    weights: dict[str, str] = {}
    tally = Tally(what, len(samples), job.max_skipped_share)
    if job.reference.path:
        folder, weights = fetch_version(job.reference.path)
        model, tokenizer = load_native(folder, dtype="bfloat16", device=default_device())
        scored = samples
    else:
        model, tokenizer = load_native(Path(job.base))
        sizes = job.reference.decoder.model_dump(exclude={"vocabulary"})
        model = resized_decoder(model, sizes, seed=job.seed).to(default_device())
        scored = [s for s in samples if fold_of(s) == job.fold]
        others = [s for s in samples if fold_of(s) != job.fold]
        if not others:
            raise DataError(
                f"no SFT sample of {', '.join(job.sources)} is left to train a reference on: all fall into one fold",
                where=job.samples,
                do="Bring more pictures, or name trained references in prune.small.path and prune.large.path.",
            )
        train(model, Feed(tokenizer, model.config), others, job, tally)
    feed = Feed(tokenizer, model.config)
    accuracy = _heldout_accuracy(model, tokenizer, feed, job, what)
    losses = _losses(model, feed, scored, tally)
    result = {"accuracy": accuracy, "weights": weights, "losses": losses, "skipped": [asdict(one) for one in tally.met]}
    out = Path(job.out)
    write_atomic(out, json.dumps(result))
    seal(out.parent, job.record, [out.name])


def fold_of(sample: Sample) -> int:
    """Fold of a sample: by its media, so that two questions about one picture never fall apart."""
    return crc32("/".join((sample.source, *sample.media)).encode()) % FOLDS


def train(model: NVILA, feed: Feed, samples: Sequence[Sample], job: Work, tally: Tally) -> None:
    """Instruction tuning of all parts in plain torch (AdamW, one cycle): enough for a reference of this size.

    Raises:
        TrainingError: a loss or a gradient is not finite.
        DataError: too many samples cannot be used.
    """
    reference = job.reference
    order = draw({"sft": samples}, {"sft": reference.epochs}, job.seed)
    total = max(1, math.ceil(len(order) / reference.batch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=reference.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, reference.learning_rate, total_steps=total, pct_start=0.1)
    progress = Progress(tally.what, total)
    model.prepare_for_training()
    for step, batch in enumerate(feed.batches(order, reference.batch)):
        tally.add(batch.skipped)
        if not batch.samples:
            schedule.step()
            progress.update(1)
            continue
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(**batch.to(model.device).forward_arguments()).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not bool((loss + norm).isfinite()):
            raise TrainingError(
                "the loss or a gradient is not finite",
                where=f"{tally.what}, optimizer step {step}",
                value=float(loss.detach()),
                do=f"Lower prune.{job.name}.learning_rate; the batch began with {', '.join(batch.samples[:5])}",
            )
        optimizer.step()
        schedule.step()
        progress.update(1, f"loss {loss.item():.3f}" if step % 10 == 0 else "")


def _heldout_accuracy(model: NVILA, tokenizer: Any, feed: Feed, job: Work, what: str) -> dict[str, float]:
    found = {}
    for source in job.sources:
        rows = read_samples(Path(job.samples), split="heldout", sources=[source])
        rows = sorted(rows, key=lambda s: crc32(s.id.encode()))[: job.heldout_limit]
        prompts = Questions.prepare(rows, feed).prompts("own")
        said = answers(model, tokenizer, prompts, batch=64, max_new_tokens=8, what=f"{what}: held-out {source}")
        found[source] = sum(is_correct(a, s.answer) for a, s in zip(said, rows, strict=True)) / max(1, len(rows))
    return found


def _losses(model: NVILA, feed: Feed, samples: Sequence[Sample], tally: Tally) -> dict[str, tuple[float, int]]:
    """Loss of each sample's answer tokens, summed (nats), and their number, by id; skipped samples have none."""
    found: dict[str, tuple[float, int]] = {}
    progress = Progress(f"{tally.what}: scoring", len(samples))
    model.eval()
    for batch in feed.batches(samples, BATCH_SCORED):
        tally.add(batch.skipped)
        progress.update(len(batch.skipped))
        if not batch.samples:
            continue
        sums, counts = token_logprobs(model, batch)
        for sample, total, count in zip(batch.samples, sums.tolist(), counts.tolist(), strict=True):
            if math.isfinite(total):
                found[sample] = (-total, int(count))
            else:
                tally.add([Skipped(sample, "the loss of its answer is not finite")])
        progress.update(len(counts))
    return found
