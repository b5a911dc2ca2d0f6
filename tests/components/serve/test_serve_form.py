from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from servable import picture, servable_model
from transformers import AutoTokenizer, Qwen2Config

from nvila.components.contracts.errors import DataError
from nvila.components.model.checkpoint.quantized import load_quantized
from nvila.components.model.checkpoint.serving import chat_template, serving_tensors, write_serving
from nvila.components.model.decode.answer import generate
from nvila.components.model.text.conversation import Turn, render
from nvila.components.model.text.prompt import make_prompt


def test_serving_folder_gives_the_same_answers(tmp_path: Path) -> None:
    """A tensor under a wrong name or a part left out would show as another answer, or only inside vLLM."""
    model, tokenizer = servable_model()
    write_serving(model, tokenizer, tmp_path / "served", dtype=torch.float32)
    again, its_tokenizer = load_quantized(tmp_path / "served")
    prompts = []
    for seed in range(4):
        image = Image.open(picture(tmp_path / f"{seed}.png", seed))
        prompts.append(make_prompt([Turn("human", "Which digit?")], [image], model.config))
    assert generate(again, its_tokenizer, prompts, 6) == generate(model, tokenizer, prompts, 6)


def test_only_what_is_computed_is_stored() -> None:
    """vLLM refuses tensors of blocks that it does not build; a tied head stored twice wastes its memory."""
    names = set(serving_tensors(servable_model()[0]))
    assert "vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight" in names
    assert not any(".encoder.layers.2." in name or "post_layernorm" in name for name in names)
    assert "llm.lm_head.weight" not in names


def test_folder_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    """Random weights in the place of missing ones would be served as a bad model."""
    model, tokenizer = servable_model()
    tensors = serving_tensors(model)
    del tensors["mm_projector.layers.2.weight"]
    write_serving(model, tokenizer, tmp_path, tensors=tensors)
    with pytest.raises(DataError, match="tensors do not match"):
        load_quantized(tmp_path)


def test_a_served_folder_carries_its_chat_template(tmp_path: Path) -> None:
    """A prompt that differs by one line break from those of training costs accuracy and is invisible."""
    model, tokenizer = servable_model(vision_mode="dynamic", s2_scales=(28,))
    write_serving(model, tokenizer, tmp_path)
    its_tokenizer = AutoTokenizer.from_pretrained(tmp_path, config=Qwen2Config())
    image = {"type": "image"}
    for content, text, markers in (
        ([image, {"type": "text", "text": "\nWhich?"}], "<image>\nWhich?", ["<image>\n"]),
        ([image], "", ["<image>\n"]),
        ([image, image, {"type": "text", "text": "Same?"}], "Same?", ["<image>"] * 2),
        ("Which <image>?", "Which <image>?", []),
    ):
        asked = [{"role": "user", "content": content}]
        rendered = its_tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert rendered == render([Turn("human", text)], markers=markers, generate=True)


def test_own_system_prompt_replaces_the_default() -> None:
    """Two system turns would be a prompt never seen in training."""
    _, tokenizer = servable_model()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=chat_template(), tokenize=False, add_generation_prompt=True
    )
    assert rendered == render([Turn("human", "Hi")], system="Be brief.", generate=True)
