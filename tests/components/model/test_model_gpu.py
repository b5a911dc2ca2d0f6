"""The model on a GPU, beside the same model on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from nvila.components.data.samples import read_samples
from nvila.components.model.batch import Batch, collate
from nvila.components.model.checkpoint.native import load_native
from nvila.components.model.decode.answer import generate
from nvila.components.model.device import default_device, use_packed_attention
from nvila.components.model.feed import Feed, Item
from nvila.components.model.nvila import NVILA
from nvila.components.model.text.conversation import Turn
from nvila.components.model.text.prompt import make_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
WITHIN = {"float32": 1e-5, "bfloat16": 0.02}
"""Of the loss, and ten times as much of the gradients."""


@pytest.fixture(scope="module")
def items(small: Any) -> list[Item]:
    """Pictures and clips, in no order of length."""
    model, tokenizer = load_native(small.model.dir("model"))
    samples = read_samples(small.samples.path("samples.parquet"), split="sft")
    chosen = [samples[0], samples[-1], samples[5], samples[-2], samples[3], samples[8]]
    return [item for _, item in Feed(tokenizer, model.config).items(chosen)[0]]


def _loaded(small: Any, dtype: str, device: str) -> NVILA:
    model, _ = load_native(small.model.dir("model"), dtype=dtype, device=device)
    model.prepare_for_training()
    return model


def _told(model: NVILA, batch: Batch) -> tuple[float, torch.Tensor]:
    """Mean loss, and the gradients of its sum, on the CPU."""
    model.zero_grad()
    output = model(**batch.to(model.device).forward_arguments(), reduction="sum")
    output.loss.backward()
    found = [parameter.grad.flatten().float().cpu() for parameter in model.parameters() if parameter.grad is not None]
    return float(output.loss.detach()) / output.supervised, torch.cat(found)


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", list(WITHIN))
def test_loss_and_gradients_are_those_of_the_cpu(small: Any, items: list[Item], dtype: str) -> None:
    """A kernel that computes something else would show in no test of a CPU."""
    wanted_loss, wanted = _told(_loaded(small, "float32", "cpu"), collate(items, 0))
    loss, found = _told(_loaded(small, dtype, default_device()), collate(items, 0))
    assert loss == pytest.approx(wanted_loss, rel=WITHIN[dtype])
    assert _apart(found, wanted) < 10 * WITHIN[dtype]


def test_packed_rows_are_padded_ones(small: Any, items: list[Item]) -> None:
    """The kernel is told where samples begin; told wrongly, they see each other."""
    model = _loaded(small, "bfloat16", default_device())
    wanted_loss, wanted = _told(model, collate(items, 0))
    assert use_packed_attention(model)
    loss, found = _told(model, collate(items, 0, rows=[0] * len(items)))
    assert loss == pytest.approx(wanted_loss, rel=WITHIN["bfloat16"])
    assert _apart(found, wanted) < 10 * WITHIN["bfloat16"]


def test_answers_are_those_of_the_cpu(small: Any) -> None:
    """What a model says must not depend on where it is asked."""
    samples = read_samples(small.samples.path("samples.parquet"), split="heldout")[:4]
    said = []
    for device in ("cpu", default_device()):
        model, tokenizer = load_native(small.model.dir("model"), dtype="float32", device=device)
        prompts = []
        for sample in samples:
            with Image.open(sample.paths[0]) as picture:
                prompts.append(make_prompt([Turn("human", f"<image>\n{sample.question}")], [picture], model.config))
        said.append(generate(model.eval(), tokenizer, prompts, 12, temperature=1.5, seed=3))
    assert said[0] == said[1] and any(said[0])
