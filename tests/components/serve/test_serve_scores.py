"""Losses read off the real vLLM's `prompt_logprobs`, held against the torch model of the same folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from servable import WITH_VLLM, clip, picture, servable_model

from nvila.components.data.samples import Sample, Turn
from nvila.components.model.checkpoint.loading import load
from nvila.components.model.checkpoint.serving import write_serving
from nvila.components.model.feed import Feed
from nvila.components.model.nvila import NVILA
from nvila.components.model.text.conversation import IGNORED
from nvila.components.model.vision.preprocess import blank
from nvila.components.serve.batch import Conversation, Score, score_with_vllm

pytestmark = WITH_VLLM

TRAINED = 200
"""`max_length_tokens`, below the decoder's 256 positions."""


def _samples(root: Path) -> list[Sample]:
    sizes = [(56, 56), (90, 30), (30, 90)]
    pictures = tuple(picture(root / f"{i}.png", i, sizes[i]).name for i in range(3))
    clips = (clip(root / "0.mp4", 0).name,)

    def sample(media: tuple[str, ...], *texts: str, kind: Literal["image", "video"] = "image") -> Sample:
        turns = tuple(Turn("gpt" if i % 2 else "human", text) for i, text in enumerate(texts))
        return Sample("s/sft/0", "s", kind, "sft", root, media, turns, "", "")

    return [
        *(sample((name,), "<image>\nWhich digit?", "three four") for name in pictures),
        sample(pictures[:2], "<image>\nand\n<image>\nSame?", "no", "<image> again?", "three <image> seven"),
        sample(pictures[:2], "Look: <image>", "three", "And <image> now", "four\nseven"),
        sample(clips, "<vila/video>\nWhich digit is third?", "seven", "And then?", "four", kind="video"),
        sample((), "Which digit?", "three", "And in row 2?", "four seven"),
        sample(pictures[:1], "Which?", "7" * (TRAINED - 40)),  # its end lies behind what training sees
    ]


@pytest.mark.parametrize(
    ("dtype", "mode", "scales", "off"),
    [("float32", "dynamic", (28,), 1e-3), ("bfloat16", "dynamic_s2", (28, 56), 1e-2)],
)
def test_vllm_scores_as_torch_does(dtype: str, mode: str, scales: tuple[int, ...], off: float, tmp_path: Path) -> None:
    """Samples would be chosen by losses of other tokens or other pictures than the reference's own; and an engine that
    a picture's placeholders end would score nothing."""
    torch.set_num_threads(1)
    model, tokenizer = servable_model(vision_mode=mode, s2_scales=scales, max_length_tokens=TRAINED)
    (tmp_path / "data").mkdir()
    samples = _samples(tmp_path / "data")
    _learn(model, tokenizer, samples[0])
    write_serving(model, tokenizer, tmp_path / "model", dtype=getattr(torch, dtype))
    model, tokenizer = load(tmp_path / "model", dtype=dtype)
    asked = [(one, hidden) for one in samples for hidden in (False, True) if one.media or not hidden]
    requests = [Conversation.of(one, blank=hidden) for one, hidden in asked]
    too_long = replace(requests[0], turns=[("human", "Which?"), ("gpt", "7" * 256)])
    nothing_left = replace(requests[0], turns=[("human", "7" * (TRAINED - 20)), ("gpt", "7")])
    gone = replace(requests[0], media=[str(tmp_path / "gone.png")])
    found = score_with_vllm(tmp_path / "model", [*requests, too_long, nothing_left, gone], work=tmp_path / "work")

    assert found[len(requests) :] == [None, None, None]
    log = next((tmp_path / "work").glob("*.log")).read_text()
    assert all(text in log for text in ("none of the decoder's 256 positions", "0 supervised tokens", "gone.png"))
    expected = [_loss(model, tokenizer, one, hidden=hidden) for one, hidden in asked]
    told = [one for one in found[: len(requests)] if one is not None]
    assert [one.tokens for one in told] == [one.tokens for one in expected]
    assert [one.nats for one in told] == [pytest.approx(one.nats, rel=off, abs=off) for one in expected]
    assert [one.right for one in told] == [one.right for one in expected]
    assert len({one.right for one in told}) == 2
    shown = [(seen.nats, unseen.nats) for seen, unseen in zip(expected[:12:2], expected[1:12:2], strict=True)]
    assert max(abs(seen - unseen) / seen for seen, unseen in shown) > 2 * off, "a blank picture makes a difference"


def _learn(model: NVILA, tokenizer: Any, sample: Sample) -> None:
    """Random weights are never right; these are about one sample."""
    batch = Feed(tokenizer, model.config).batch([sample])
    optimizer = torch.optim.Adam(model.llm.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(**batch.forward_arguments()).loss.backward()
        optimizer.step()


def _loss(model: NVILA, tokenizer: Any, sample: Sample, *, hidden: bool) -> Score:
    batch = Feed(tokenizer, model.config).batch([sample])
    assert batch.samples
    if hidden:
        batch = replace(batch, visuals=[blank(visual) for visual in batch.visuals])
    with torch.no_grad():
        output = model(**batch.forward_arguments(), reduction="sum", full_logits=True)
    labels = output.labels[:, 1:]
    right = output.logits[:, :-1].argmax(-1)[labels != IGNORED] == labels[labels != IGNORED]
    return Score(float(output.loss), output.supervised, bool(right.all()))
