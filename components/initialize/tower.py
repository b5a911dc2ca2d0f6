"""Pre-trains a small vision tower on image labels with SigLIP's pairwise sigmoid loss (arXiv 2303.15343, section 3.2).

The text side is a table with one embedding per label text, which is all that a closed set of labels needs. The language
loss alone does not teach a blank tower in minutes, so a model made from scratch begins here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

from nvila.components.contracts.errors import DataError, TrainingError
from nvila.components.contracts.progress import Progress, track
from nvila.components.contracts.results.result import SkippedRecords
from nvila.components.data.media import Limits, load_image, load_video_frame
from nvila.components.data.samples import Label
from nvila.components.data.skipped import Skipped, Tally
from nvila.components.model.nvila import NVILA
from nvila.components.model.schedule import one_cycle
from nvila.components.model.vision.preprocess import normalise

HELD_BACK = 0.05
"""Share of the label records that measures the tower instead of training it."""


SHIFT, SCALE = 0.06, 0.12
"""Largest move of a training tile, in sides, and largest change of its size."""


@dataclass(frozen=True)
class LabelRecords:
    """Pictures, cut and resized to one tile, with their labels."""

    tiles: torch.Tensor
    """uint8, (n, 3, S, S)."""
    targets: torch.Tensor
    """bool, (n, labels): which label texts are true of the picture."""
    known: torch.Tensor
    """bool, (n, labels): labels whose attribute the record speaks of; only these enter the loss."""
    weights: torch.Tensor
    """float, (n,): how often a record is drawn. Sources count equally: a source with many boxes per picture would drown
    the others."""
    labels: list[str]
    skipped: SkippedRecords
    """Pictures that could not be read: how many, and the first ones."""


def read_label_records(records: Sequence[Label], tile_pixels: int, max_skipped_share: float = 0.0) -> LabelRecords:
    """Decode and cut the pictures of label records.

    A label is `attribute value` ("digit 3", "row 1 column 2: 7") or a bare value ("red"). A record denies the other
    values of each attribute it speaks of, and says nothing of the attributes it does not name.

    Raises:
        DataError: more than this share of the pictures cannot be read.
    """
    labels = sorted({label for record in records for label in record.labels})
    index = {label: i for i, label in enumerate(labels)}
    attribute = np.array([_attribute(label) for label in labels])
    tiles = np.empty((len(records), 3, tile_pixels, tile_pixels), dtype=np.uint8)
    targets = np.zeros((len(records), len(labels)), dtype=bool)
    known = np.zeros_like(targets)
    tally = Tally("label pictures", len({(record.source, record.media) for record in records}), max_skipped_share)
    read = np.zeros(len(records), dtype=bool)
    for i, record in enumerate(track(records, "label pictures")):
        try:
            tiles[i] = _tile(record, tile_pixels)
        except DataError as error:
            tally.add([Skipped.of(f"{record.source}/{record.media}", error)])
            continue
        read[i] = True
        for label in record.labels:
            targets[i, index[label]] = True
            known[i] |= attribute == _attribute(label)
    of_source = Counter(record.source for record, good in zip(records, read, strict=True) if good)
    weights = torch.tensor([1.0 / of_source[r.source] for r, good in zip(records, read, strict=True) if good])
    kept = [torch.from_numpy(array if read.all() else array[read]) for array in (tiles, targets, known)]
    return LabelRecords(kept[0], kept[1], kept[2], weights, labels, tally.summary())


def train_tower(
    model: NVILA, records: LabelRecords, *, epochs: float, learning_rate: float, batch: int, seed: int
) -> dict[str, float]:
    """Teach `model.vision_tower` in place, through the feature layer that the projector will read.

    Returns:
        `accuracy`: share of attributes whose most likely value is right, on records held back from training;
        `steps`: optimizer steps taken.

    Raises:
        TrainingError: the loss or a weight is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(records.tiles), generator=generator)
    back = max(1, int(HELD_BACK * len(order)))
    held, train = order[:back], order[back:]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokens, width = _features(model, records.tiles[:1]).shape[1:]
        head = _Head(tokens, width, len(records.labels))
    parameters = [*model.vision_tower.parameters(), *head.parameters()]
    total = max(1, math.ceil(epochs * len(train) / batch))
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = one_cycle(optimizer, learning_rate, total)
    progress = Progress("vision tower on labels", total)
    model.train()
    for step in range(total):
        chunk = train[torch.multinomial(records.weights[train], batch, replacement=True, generator=generator)]
        tiles = _jitter(normalise(records.tiles[chunk]), generator)
        targets, known = records.targets[chunk].float(), records.known[chunk].float()
        logits = head(model.features(tiles))
        loss = functional.binary_cross_entropy_with_logits(logits, targets, weight=known, reduction="sum") / batch
        if not bool(loss.isfinite()):
            raise _not_finite("the loss is not finite", step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update(1, f"loss {loss.item():.3f}" if step % 10 == 0 else "")
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise _not_finite("weights are not finite", total)
    return {"accuracy": _accuracy(model, head, records, held), "steps": float(total)}


def _not_finite(what: str, step: int) -> TrainingError:
    where = f"vision tower on labels, optimizer step {step}"
    return TrainingError(what, where=where, do="Lower model.base.learning_rate")


class _Head(nn.Module):
    """Features of a tile -> one embedding -> scaled similarity with each label's embedding."""

    def __init__(self, tokens: int, width: int, labels: int) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.LayerNorm(tokens * width), nn.Linear(tokens * width, width))
        self.text = nn.Parameter(torch.randn(labels, width))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-5.0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, tokens, width) features -> (B, labels) logits."""
        image = functional.normalize(self.image(features.flatten(1)), dim=-1)
        text = functional.normalize(self.text, dim=-1)
        return image @ text.T * self.log_scale.exp() + self.bias


def _features(model: NVILA, tiles: torch.Tensor) -> torch.Tensor:
    """(B, 3, S, S) uint8 -> (B, tokens, width): SigLIP's normalisation, then the feature layer of the tower."""
    return model.features(normalise(tiles))


def _jitter(tiles: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each tile moved by up to `SHIFT` of its side and scaled by up to `SCALE`: a small tower must not learn places."""
    n = len(tiles)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + SCALE * (2 * torch.rand(n, generator=generator) - 1)
    theta[:, :, 2] = 2 * SHIFT * (2 * torch.rand(n, 2, generator=generator) - 1)
    grid = functional.affine_grid(theta, list(tiles.shape), align_corners=False)
    return functional.grid_sample(tiles, grid, padding_mode="border", align_corners=False)


def _accuracy(model: NVILA, head: _Head, records: LabelRecords, held: torch.Tensor) -> float:
    """Share of (record, attribute) pairs whose most likely labels are exactly the true ones."""
    attributes = [_attribute(label) for label in records.labels]
    groups = [torch.tensor([i for i, a in enumerate(attributes) if a == b]) for b in sorted(set(attributes))]
    right = asked = 0
    model.eval()
    with torch.no_grad():
        for chunk in held.split(512):
            logits, targets = head(_features(model, records.tiles[chunk])), records.targets[chunk]
            for columns in groups:
                true = targets[:, columns]
                rank = logits[:, columns].argsort(1, descending=True).argsort(1)
                likely = rank < true.sum(1, keepdim=True)
                rows = true.any(1)
                right += int((likely == true).all(1)[rows].sum())
                asked += int(rows.sum())
    return right / asked


def _attribute(label: str) -> str:
    return label.rpartition(" ")[0]


def _tile(record: Label, tile_pixels: int) -> np.ndarray:
    """The record's picture or frame, cut to its box and resized: uint8 (3, S, S)."""
    picture = _picture(record.path, record.frame, record.limits)
    if record.box is not None:
        left, top, right, bottom = record.box
        width, height = picture.size
        picture = picture.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
    tile = picture.resize((tile_pixels, tile_pixels), Image.Resampling.BICUBIC)
    return np.asarray(tile, dtype=np.uint8).transpose(2, 0, 1)


@lru_cache(maxsize=1)
def _picture(path: Path, frame: int | None, limits: Limits) -> Image.Image:
    """Records of one picture follow each other: it is decoded once."""
    return load_image(path, limits) if frame is None else load_video_frame(path, frame, limits)
