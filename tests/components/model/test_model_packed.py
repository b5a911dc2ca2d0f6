"""Samples that share a row of the decoder, beside the same samples in rows of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nvila.components.data.samples import read_samples
from nvila.components.model.batch import Batch, collate
from nvila.components.model.checkpoint.native import load_native
from nvila.components.model.device import kernel_arguments
from nvila.components.model.feed import Feed, Item
from nvila.components.model.nvila import NVILA
from nvila.components.model.text.conversation import Encoded

ROWS = [0, 0, 0, 1, 2, 2]


@pytest.fixture(scope="module")
def model(small: Any) -> NVILA:
    torch.manual_seed(0)
    model, _ = load_native(small.model.dir("model"), dtype="float32")
    model.prepare_for_training()
    return model


@pytest.fixture(scope="module")
def items(small: Any, model: NVILA) -> list[Item]:
    """Pictures and clips, in no order of length."""
    _, tokenizer = load_native(small.model.dir("model"))
    feed = Feed(tokenizer, model.config)
    samples = read_samples(small.samples.path("samples.parquet"), split="sft")
    chosen = [samples[0], samples[-1], samples[5], samples[-2], samples[3], samples[8]]
    assert {sample.kind for sample in chosen} == {"image", "video"}
    return [item for _, item in feed.items(chosen)[0]]


def gradients(model: NVILA, batch: Batch) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    output = model(**batch.forward_arguments(), reduction="sum")
    output.loss.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return float(output.loss.detach()) / output.supervised, torch.cat(found) / output.supervised


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rows", [ROWS, [0] * 6], ids=["rows", "one row"])
def test_loss_and_gradients_are_those_of_padded_rows(
    model: NVILA, items: list[Item], attention: str, rows: list[int]
) -> None:
    """A sample that sees another, or whose positions run on, learns from what it will never be shown."""
    before = model.llm.config._attn_implementation
    model.llm.set_attn_implementation(attention)
    try:
        loss, wanted = gradients(model, collate(items, 0))
        packed_loss, found = gradients(model, collate(items, 0, rows=rows))
    finally:
        model.llm.set_attn_implementation(before)
    assert packed_loss == pytest.approx(loss, abs=1e-6)
    assert float((found - wanted).abs().max()) < 1e-6


def test_no_sample_sees_another(model: NVILA, items: list[Item]) -> None:
    """Other samples of the row may be replaced: what is predicted for this one stays."""
    other = list(items)
    other[0], other[2] = other[3], other[4]
    with torch.no_grad():
        batches = [collate(some, 0, rows=ROWS[:3]) for some in (items[:3], other[:3])]
        seen = [model.prepare(**batch.forward_arguments()) for batch in batches]
        hidden = [model.hidden_states(spliced) for spliced in seen]
    begins = [int(spliced.lengths_S[0]) for spliced in seen if spliced.lengths_S is not None]
    length = int(seen[0].lengths_S[1])  # type: ignore[index]
    ours, theirs = (h[0, b : b + length] for h, b in zip(hidden, begins, strict=True))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_sample_is_not_predicted_from_the_one_before_it(model: NVILA, items: list[Item]) -> None:
    """With every token supervised there is one label less for each sample, as where each has a row."""
    whole = [(Encoded(encoded.input_ids, list(encoded.input_ids)), visuals) for encoded, visuals in items]
    with torch.no_grad():
        counts = [model(**collate(whole, 0, rows=rows).forward_arguments()).supervised for rows in (None, ROWS)]
    assert counts[0] == counts[1]


def test_a_kernel_is_told_where_samples_begin() -> None:
    """Without a mask everything it knows of samples is where they begin."""
    told = kernel_arguments("varlen", torch.tensor([3, 5, 2]))
    assert told["cu_seq_lens_q"].tolist() == [0, 3, 8, 10] and told["cu_seq_lens_q"].dtype == torch.int32
    assert told["max_length_q"] == told["max_length_k"] == 5
    assert kernel_arguments("sdpa", torch.tensor([3])) == kernel_arguments("varlen", None) == {}
