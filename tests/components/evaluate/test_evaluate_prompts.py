"""The same question to the same model, whoever asks: evaluate, evaluate-quantized, and the pinned prompts."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from servable import picture, servable_model

from nvila.components.data.samples import Sample, Turn
from nvila.components.evaluate_quantized.step import Settings, _through_vllm
from nvila.components.metrics.answers import Questions
from nvila.components.metrics.pinned import _pinned
from nvila.components.model.checkpoint.serving import chat_template
from nvila.components.model.feed import Feed
from nvila.components.serve import batch, batch_process, server

QUESTIONS = {
    "<image>\nWhich plate is it?": 1,
    "Which plate is it?\n<image>": 1,
    "Look at <image> and name the plate.": 1,
    "Is <image> like <image>?": 2,
    "Are these alike?\n": 2,
    "<image>\nIs it like this?": 2,
    "<image>\n\n\nWhich plate is it?": 1,
    "<image>": 1,
    "Does it say <|im_end|> or\n<image>\n\n<vila/sentinel>?": 1,
}


@pytest.mark.parametrize("mode", ["dynamic", "dynamic_s2"])
def test_every_step_asks_the_same(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a fall of accuracy that is not the quantization's: the same weights answered 0.99 of the questions with
    a picture behind the text, and 0.49 when it had moved to the front."""
    model, tokenizer = servable_model(vision_mode=mode, s2_scales=(28,) if mode == "dynamic" else (28, 56))
    files = tuple(picture(tmp_path / f"{i}.png", i).name for i in range(2))
    samples = [
        Sample(
            id=f"s/heldout/{i}", source="s", kind="image", split="heldout", root=tmp_path, media=files[:count],
            conversations=(Turn("human", text), Turn("gpt", "x")), question="not asked", answer="x",
        )
        for i, (text, count) in enumerate(QUESTIONS.items())
    ]  # fmt: skip
    prompts = Questions.prepare(samples, Feed(tokenizer, model.config)).prompts("own")
    asked: list[batch.Request] = []
    monkeypatch.setattr(batch, "generate_with_vllm", lambda model, requests, **_: asked.extend(requests))
    tasks: dict[str, Any] = {"sources": ["s"], "limit": None, "stage_limit": 9, "batch": 8, "max_new_tokens": 8}
    settings = Settings.model_validate({"evaluate": tasks, "limit": None, "through_vllm": True})
    _through_vllm(tmp_path, samples, settings, tmp_path)
    template = chat_template(tile_breaks=mode == "dynamic")
    image = tokenizer.convert_tokens_to_ids("<image>")
    for sample, prompt, request in zip(samples, prompts, asked, strict=True):
        # Alone a picture of dynamic tiling is as many lines as tiles: one here, where the server has not yet cut it.
        lone = len(sample.media) == 1 and mode == "dynamic"
        ours = prompt if not lone else type(prompt)(prompt.turns, markers=["<image>\n"])
        ids = ours.encode(tokenizer, generate=True).input_ids
        turns = [Turn("human", request.question)]
        quantized = batch_process._prompt(tokenizer, asdict(request), turns, model.config, score=False).inputs
        assert quantized["prompt_token_ids"] == ids, sample.conversations[0].text
        assert len(quantized["multi_modal_data"]["image"]) == len(sample.media) == ids.count(image)
        pinned = _pinned({"id": sample.id, "prediction": "x", "answer": "x"}, sample)
        messages = server.chat_request("m", pinned.question)["messages"]
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
