"""The baseline `clusters`: k-means over what the vision tower sees, as many samples of each (paper, table 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from nvila.components.contracts.errors import DataError
from nvila.components.data.samples import Sample
from nvila.components.model.feed import Feed
from nvila.components.model.nvila import NVILA
from nvila.components.prune.scoring import WINDOW, look

if TYPE_CHECKING:
    from sklearn.cluster import MiniBatchKMeans

FITTED_MEDIA = 4096
"""Of each source, from which the clusters are made."""


def pooled(model: NVILA, feed: Feed, samples: Sequence[Sample]) -> np.ndarray:
    """(n, C) float32: the tower's features of each sample's media, averaged over tiles and patches, of length 1; a row
    that is not a number where a medium cannot be read."""
    width = int(model.config.vision["hidden_size"])
    found: dict[tuple[Path, tuple[str, ...]], np.ndarray] = {}
    for first in range(0, len(samples), WINDOW):
        fresh = {}
        for sample in samples[first : first + WINDOW]:
            shown = sample.root, sample.media
            if shown not in found and shown not in fresh:
                try:
                    fresh[shown] = feed.prompt(sample, tile_all=True).visuals
                except DataError:
                    found[shown] = np.full(width, np.nan, dtype=np.float32)
        for shown, visuals in zip(fresh, look(model, list(fresh.values())), strict=True):
            seen = [visual.features.float().mean((0, 1)) for visual in visuals if visual.features is not None]
            mean = (
                np.mean([features.cpu().numpy() for features in seen], axis=0) if seen else np.zeros(width, np.float32)
            )
            found[shown] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    rows = [found[sample.root, sample.media] for sample in samples]
    return np.stack(rows) if rows else np.zeros((0, width), dtype=np.float32)


def fit(features: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """(k, C) centres of k-means over (n, C) features; k is `clusters` or the number of different rows."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    known = features[np.isfinite(features).all(axis=1)]
    k = min(clusters, len(np.unique(known, axis=0)))
    if k == 0:
        return np.zeros((0, features.shape[1] if features.ndim == 2 else 0), dtype=np.float32)
    means: MiniBatchKMeans = MiniBatchKMeans(k, random_state=seed, n_init=3, batch_size=1024)
    with threadpool_limits(1):  # sums of several threads differ in their last digits
        return means.fit(known).cluster_centers_.astype(np.float32)


def nearest(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(n,) int32 place of the nearest centre; -1 where the features are not known."""
    if not len(centres):
        return np.full(len(features), -1, dtype=np.int32)
    known = np.isfinite(features).all(axis=1)
    distances = (centres**2).sum(1) - 2 * np.nan_to_num(features) @ centres.T
    return np.where(known, distances.argmin(1), -1).astype(np.int32)


def media_to_fit(samples: Iterable[Sample]) -> list[Sample]:
    """One sample of each of at most `FITTED_MEDIA` media, chosen by a digest of their names; no more are held."""
    chosen: dict[tuple[str, ...], tuple[int, Sample]] = {}
    for sample in samples:
        chosen.setdefault(sample.media, (crc32("/".join(sample.media).encode()), sample))
        if len(chosen) > 2 * FITTED_MEDIA:
            chosen = _first(chosen)
    return [sample for _, sample in _first(chosen).values()]


def _first(chosen: dict[tuple[str, ...], tuple[int, Sample]]) -> dict[tuple[str, ...], tuple[int, Sample]]:
    return dict(sorted(chosen.items(), key=lambda item: (item[1][0], item[0]))[:FITTED_MEDIA])
