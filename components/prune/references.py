"""Reference models: checkpoints, or small ones trained here on one fold of the samples, which then score the other."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import torch

from nvila.components.contracts.digests import is_sha256
from nvila.components.contracts.errors import DataError, TrainingError
from nvila.components.contracts.progress import Progress
from nvila.components.contracts.recipe.prune import Reference
from nvila.components.contracts.sealed import fault, seal
from nvila.components.data.mixture import draw
from nvila.components.data.samples import Sample, read_samples
from nvila.components.data.skipped import Skipped, Tally
from nvila.components.model.batch import Batch, collate
from nvila.components.model.checkpoint.native import load_native, save_native
from nvila.components.model.feed import Feed, Item
from nvila.components.model.fresh import resized_decoder
from nvila.components.model.nvila import NVILA
from nvila.components.model.schedule import one_cycle
from nvila.components.model.text.tokenizer import TokenIds
from nvila.components.prune.scoring import look

if TYPE_CHECKING:
    from nvila.components.prune.work import Job

FOLDS = 2
KEPT_BYTES = 2**30
"""Features of media, which a reference sees in every epoch."""


def fold_of(sample: Sample) -> int:
    """Fold of a sample: by its first medium, by its bytes where their digest is known, so that all questions about one
    picture, and its captions, are in one, whatever source or folder they come from; else by its name."""
    digest = next(iter(sample.media_sha256), None)
    if is_sha256(digest):
        return int(str(digest)[:8], 16) % FOLDS
    return crc32(next(iter(sample.media), sample.id).encode()) % FOLDS


def trained(name: str, reference: Reference, fold: int, job: Job, device: str) -> Path:
    """The checkpoint of a reference that has not seen `fold`: made now, or by an attempt before this one.

    Args:
        name: `small` or `large`.
        reference: sizes and training.
        fold: what it will score; it learns from the others.
        job: of the step (`work.Job`).
        device: to train on.

    Raises:
        DataError: no sample is left to train on; more cannot be used than `max_skipped_share` allows.
        TrainingError: a loss or a gradient is not finite.
    """
    folder = job.folder / "references"
    done, record = folder / f"{name}-{fold}", folder / f"{name}-{fold}.sealed.json"
    if fault(folder, record) is None:
        return done
    torch.manual_seed(job.seed)
    base, tokenizer = load_native(job.base, device=device)
    sizes = reference.decoder.model_dump(exclude={"vocabulary"})
    model = resized_decoder(base, sizes, seed=job.seed).to(device)
    _train(name, reference, model, Lesson(Feed(tokenizer, model.config), base), fold, job)
    shutil.rmtree(done, ignore_errors=True)
    save_native(model, tokenizer, done)
    seal(folder, record, [f"{done.name}/**/*"])
    return done


class Lesson:
    """Batches of samples whose media the frozen tower sees once, as far as they fit in memory."""

    def __init__(self, feed: Feed, base: NVILA) -> None:
        self._feed, self._base = feed, base
        self._left_bytes = KEPT_BYTES
        self._kept: dict[str, Item] = {}
        self._pad = TokenIds.of(feed.tokenizer, feed.config.video_texts).pad

    def batches(self, samples: Sequence[Sample], batch: int) -> Iterator[Batch]:
        """Consecutive batches of `samples`."""
        for first in range(0, len(samples), batch):
            yield self._batch(samples[first : first + batch])

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        good: list[Sample] = []
        fresh: dict[str, Item] = {}
        skipped: list[Skipped] = []
        for sample in samples:
            try:
                if sample.id not in self._kept and sample.id not in fresh:
                    fresh[sample.id] = self._feed.item(sample)
                good.append(sample)
            except DataError as error:
                skipped.append(Skipped.of(sample.id, error))
        seen = look(self._base, [visuals for _, visuals in fresh.values()])
        for (name, (encoded, _)), visuals in zip(list(fresh.items()), seen, strict=True):
            fresh[name] = (encoded, visuals)
            self._keep(name, fresh[name])
        items = [fresh.get(sample.id) or self._kept[sample.id] for sample in good]
        made = collate(items, self._pad)
        return replace(made, samples=tuple(sample.id for sample in good), skipped=tuple(skipped))

    def _keep(self, name: str, item: Item) -> None:
        encoded, visuals = item
        size = 64 * len(encoded.input_ids)
        size += sum(visual.features.nbytes for visual in visuals if visual.features is not None)
        if size <= self._left_bytes:
            self._left_bytes -= size
            self._kept[name] = item


def _train(name: str, reference: Reference, model: NVILA, lesson: Lesson, fold: int, job: Job) -> None:
    """Instruction tuning of projector and decoder in plain torch (AdamW, one cycle): enough for a reference."""
    what = f"{name} reference, fold {fold}"
    order = _order(reference, fold, job)
    tally = Tally(what, len({sample.id for sample in order}), job.max_skipped_share)
    total = max(1, math.ceil(len(order) / reference.batch))
    model.vision_tower.requires_grad_(False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=reference.learning_rate, weight_decay=0.0)
    schedule = one_cycle(optimizer, reference.learning_rate, total)
    progress = Progress(what, total)
    model.prepare_for_training()
    for step, batch in enumerate(lesson.batches(order, reference.batch)):
        tally.add(batch.skipped)
        if not batch.samples:
            schedule.step()
            progress.update(1)
            continue
        with torch.autocast(model.device.type, torch.bfloat16):
            loss = model(**batch.to(model.device).forward_arguments()).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learning, 1.0)
        if not bool((loss + norm).isfinite()):
            raise TrainingError(
                "the loss or a gradient is not finite",
                where=f"{what}, optimizer step {step}",
                value=float(loss.detach()),
                do=f"Lower prune.{name}.learning_rate; the batch began with {', '.join(batch.samples[:5])}",
            )
        optimizer.step()
        schedule.step()
        progress.update(1, f"loss {loss.item():.3f}" if step % 10 == 0 else "")


def _order(reference: Reference, fold: int, job: Job) -> list[Sample]:
    """Captions of the other folds' media, then their SFT samples."""
    found: list[Sample] = []
    for split, epochs in (("captions", reference.caption_epochs), ("sft", reference.epochs)):
        rows = read_samples(job.samples, split=split, sources=job.sources) if epochs else []
        others = [sample for sample in rows if fold_of(sample) != fold]
        if split == "sft" and not others:
            raise DataError(
                f"no SFT sample of {', '.join(job.sources)} is left to train a reference on: all fall into one fold",
                where=str(job.samples),
                do="Bring more pictures, or name trained references in prune.small.path and prune.large.path.",
            )
        found += draw({split: others}, {split: epochs}, job.seed)
    return found
