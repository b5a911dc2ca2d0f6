"""Batches out of worker processes."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nvila.components.data.samples import read_samples
from nvila.components.model.checkpoint.native import read_config
from nvila.components.model.feed import Feed
from nvila.components.model.text.tokenizer import load_tokenizer


@pytest.fixture
def feed(small: Any) -> Feed:
    folder = small.model.dir("model")
    return Feed(load_tokenizer(folder / "llm"), read_config(folder))


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 100, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_descriptors")
def test_many_pictures_fit_a_common_limit_of_open_files(feed: Feed, small: Any) -> None:
    """Every tensor on its way between processes holds a descriptor: one a picture breaks Debian's limit of 1024."""
    samples = read_samples(small.samples.path("samples.parquet"), split="sft", sources=["colours"]) * 40
    batches = feed.batches(samples, 64, workers=1)
    found = len(next(batches).visuals)
    time.sleep(1.0)  # the other process is as far ahead as it may be
    assert found + sum(len(batch.visuals) for batch in batches) == 960


def test_batches_are_the_same_from_any_number_of_processes(feed: Feed, small: Any) -> None:
    """Tiles that end up at another sample's marker train the wrong answers without any error."""
    samples = read_samples(small.samples.path("samples.parquet"), split="sft")
    here, there = (list(feed.batches(samples, 7, start=1, workers=workers)) for workers in (0, 1))
    assert len(here) == len(there) == -(-(len(samples) - 7) // 7)
    items = iter([feed.item(sample) for sample in samples[7:]])
    for ours, theirs in zip(here, there, strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.labels, theirs.labels)
        wanted = [visual for _ in ours.input_ids for visual in next(items)[1]]
        for batch in (ours, theirs):
            assert [(v.kind, v.block_size) for v in batch.visuals] == [(v.kind, v.block_size) for v in wanted]
            assert all(torch.equal(a.tiles, b.tiles) for a, b in zip(batch.visuals, wanted, strict=True))
