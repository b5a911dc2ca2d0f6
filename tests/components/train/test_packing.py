"""Which samples share a pass: arithmetic, and what the windows make of samples that are ready."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import chain

import pytest

from nvila.components.model.text.conversation import Encoded
from nvila.components.train import windows as windowing
from nvila.components.train.loader import Ready
from nvila.components.train.packing import Cost, arrange, first_fit, waste
from nvila.components.train.windows import Windows

TINY = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"intermediate_size": 256}
CPU, KERNEL = Cost.of(TINY, gpu=False), Cost.of(TINY, gpu=True, kernel=True)


def log_normal(n: int, seed: int = 0) -> list[int]:
    """Lengths with median 700 and 95th percentile 4,000, cut at 8,192."""
    rng = random.Random(seed)
    spread = math.log(4000 / 700) / 1.6449
    return [min(8192, max(8, round(rng.lognormvariate(math.log(700), spread)))) for _ in range(n)]


def uniform(n: int, low: int, high: int) -> list[int]:
    rng = random.Random(0)
    return [rng.randint(low, high) for _ in range(n)]


@pytest.mark.parametrize("packing", ["auto", "padded", "grouped", "packed"])
@pytest.mark.parametrize("cost", [CPU, KERNEL], ids=["cpu", "kernel"])
def test_every_sample_goes_through_once_and_no_pass_is_larger_than_planned(packing: str, cost: Cost) -> None:
    """A sample lost or doubled is another global batch; a row beyond the plan ends in no memory."""
    lengths = log_normal(100)
    passes = arrange(lengths, 4, 8192, cost, packing).passes
    assert sorted(chain.from_iterable(row for rows in passes for row in rows)) == list(range(100))
    assert all(len(rows) <= 4 for rows in passes)
    assert all(sum(lengths[i] for i in row) <= 8192 for rows in passes for row in rows)


def test_what_is_chosen_fits_the_lengths() -> None:
    """Packed rows of tiny's 31 to 46 tokens take twice the time on a CPU; padding 32 to 512 to 512 does as well."""
    assert arrange(uniform(64, 31, 46), 64, 512, CPU).passes == [[[i] for i in range(64)]]
    wide = arrange(uniform(64, 32, 512), 64, 512, CPU)
    assert wide.packing == "grouped" and wide.costs["padded"] > 1.5 * wide.cost
    assert "padded would cost" in wide.words
    assert arrange(uniform(64, 32, 512), 64, 512, KERNEL).packing == "packed"


@pytest.mark.parametrize("seed", range(5))
def test_packing_leaves_little_empty(seed: int) -> None:
    """Of a batch padded to its longest more than half would be padding."""
    lengths = log_normal(256, seed)
    cost = Cost.of(TINY | {"hidden_size": 4096, "intermediate_size": 16384}, gpu=True)
    rows = first_fit(lengths, 8192)
    assert 1 - sum(lengths) / (8192 * len(rows)) < 0.04
    assert waste(arrange(lengths, 4, 8192, cost, "packed").passes, lengths) < 0.04
    assert waste(arrange(lengths, 4, 8192, cost, "padded").passes, lengths) > 0.5


def ready(lengths: list[int], at: int = 0) -> Iterator[Ready]:
    """Samples of these lengths, sixteen at a time, with a skipped one now and then."""
    for first in range(0, len(lengths), 16):
        some = lengths[first : first + 16]
        names = [str(at + first + i) for i in range(len(some))]
        yield Ready(names, [(Encoded([7] * n, [-100] + [7] * (n - 1)), []) for n in some], some, [])


@pytest.mark.parametrize("packing", ["padded", "grouped", "packed"])
def test_windows_of_a_batch_lose_nothing(monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    """What is open at a window's end goes into the next one; a window that fills no pass waits for more."""
    monkeypatch.setattr(windowing, "WINDOW", 32)
    lengths = uniform(200, 8, 100)
    windows = Windows(lambda some: arrange(some, 4, 128, CPU, packing), 0, flat=False)
    batches = list(windows.passes(ready(lengths)))
    assert sorted(map(int, chain.from_iterable(batch.samples for batch in batches))) == list(range(200))
    for batch in batches:
        assert batch.positions == sum(lengths[int(name)] for name in batch.samples) == int(batch.attention_mask.sum())
        assert batch.computed >= batch.positions
        assert (batch.rows is not None) == (packing == "packed")
    if packing == "padded":
        assert [name for batch in batches for name in batch.samples] == [str(i) for i in range(200)]
        assert {len(batch.samples) for batch in batches} == {4}
    whole = Windows(lambda some: arrange(some, 256, 128, CPU, "padded"), 0, flat=False)
    assert [len(batch.samples) for batch in whole.passes(ready(lengths))] == [200]


def test_a_kernel_gets_one_row_and_a_step_one_pass_at_least() -> None:
    """A process whose samples are all unusable must still meet the others in a pass."""
    from nvila.components.data.skipped import Skipped

    windows = Windows(lambda some: arrange(some, 2, 64, KERNEL), 0, flat=True)
    batches = list(windows.passes(ready(uniform(40, 8, 64))))
    assert all(set(batch.rows.tolist()) == {0} for batch in batches if batch.rows is not None)
    assert all(batch.computed == batch.positions <= 128 for batch in batches)
    spoilt = Ready(skipped=[Skipped("a", "gone")])
    (only,) = windows.passes(iter([spoilt]))
    assert only.samples == () and [one.id for one in only.skipped] == ["a"]
    assert len(list(windows.passes(iter([])))) == 1


@pytest.mark.parametrize(("packing", "flat"), [("padded", False), ("packed", False), ("packed", True)])
def test_what_is_padded_for_fp8_counts_as_padding(packing: str, flat: bool) -> None:
    """The padding's share that the meter tells would be too small."""
    cost = KERNEL if flat else CPU
    lengths = uniform(40, 8, 100)
    passes = [
        list(
            Windows(lambda some: arrange(some, 3, 128, cost, packing), 0, flat=flat, multiple=n).passes(ready(lengths))
        )
        for n in (1, 16)
    ]
    for plain, padded in zip(*passes, strict=True):
        assert plain.samples == padded.samples and (plain.multiple, padded.multiple) == (1, 16)
        assert padded.computed % 16 == 0 and 0 <= padded.computed - plain.computed < 16 * 3
    assert sum(batch.computed for batch in passes[1]) > sum(batch.computed for batch in passes[0])
