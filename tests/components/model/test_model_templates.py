from typing import Any

import pytest

from nvila.components.model.text.conversation import Turn, encode, render
from nvila.components.model.text.templates import TEMPLATES, stop_tokens, template_for

TALK = [Turn("human", "<image>\nA?"), Turn("gpt", "b"), Turn("human", "C?"), Turn("gpt", "d")]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vicuna_v1", f"{VICUNA}USER: <image>A? ASSISTANT: b</s>USER: C? ASSISTANT: d</s>"),
        (
            "llama_3",
            f"<|begin_of_text|>{header('system')}S<|eot_id|>{header('user')}<image>A?<|eot_id|>{header('assistant')}b"
            f"<|eot_id|>{header('user')}C?<|eot_id|>{header('assistant')}d<|end_of_text|>",
        ),
        (
            "hermes-2",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>A?<|im_end|>"
            "<|im_start|>assistant\nb<|im_end|><|im_start|>user\nC?<|im_end|><|im_start|>assistant\nd<|im_end|>",
        ),
        ("plain", "<image>A?\nb\nC?\nd\n"),
    ],
)
def test_legacy_templates(name: str, text: str) -> None:
    """Prevents older models from being asked in words that they were not trained with."""
    assert render(TALK, template=TEMPLATES[name], system="S" if name == "llama_3" else None) == text


def test_openings_for_generation() -> None:
    """Prevents a question that ends where no model was taught to go on."""
    ends = {"vicuna_v1": "A? ASSISTANT:", "llama_3": f"A?<|eot_id|>{header('assistant')}", "plain": "A?\n"}
    for name, end in ends.items():
        assert render(TALK[:1], generate=True, template=TEMPLATES[name]).endswith(end)
    middle = render(TALK, generate=True, template=TEMPLATES["llama_3"])
    assert "<|end_of_text|>" not in middle  # the last answer is not the end when another is asked for


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_in_every_template(tokenizer: Any, name: str) -> None:
    """Prevents prompts from being supervised, or ends of answers from not being, in any template."""
    template = TEMPLATES[name]
    encoded = encode(tokenizer, TALK, template=template)
    supervised = [token for token in encoded.labels if token != -100]
    first, last = (f"{template.answer_lead}{text}" for text in "bd")
    expected = first + template.answer_end + last + (template.last_end or template.answer_end)
    assert tokenizer.decode(supervised) == expected


def test_choice_by_name() -> None:
    """Prevents NVILA from getting an older model's template, and the other way round."""
    assert template_for("Efficient-Large-Model/NVILA-8B") is TEMPLATES["qwen2"]
    assert template_for("/models/VILA1.5-3b-s2") is TEMPLATES["vicuna_v1"]
    assert template_for("Llama-3-VILA1.5-8B") is TEMPLATES["llama_3"]
    assert template_for("VILA1.5-40b") is TEMPLATES["hermes-2"]
    assert template_for("nvila15b-old") is TEMPLATES["vicuna_v1"]


def test_stop_tokens(tokenizer: Any) -> None:
    """Prevents answers that run on: NVILA stops at <|im_end|> and nothing else, and at its own end of sequence too."""
    end, text_end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert stop_tokens(tokenizer) == {end}
    eos, tokenizer.eos_token = tokenizer.eos_token, "<|endoftext|>"
    try:
        assert stop_tokens(tokenizer) == {end, text_end}
    finally:
        tokenizer.eos_token = eos


def test_no_system_variant(tokenizer: Any) -> None:
    """Prevents the default prompt from appearing where a conversation asks for none."""
    assert render(TALK[:1], system="").startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")
    with_prompt, without = (encode(tokenizer, TALK, system=system) for system in (None, ""))
    assert len(without.input_ids) < len(with_prompt.input_ids)
    assert [x for x in without.labels if x != -100] == [x for x in with_prompt.labels if x != -100]
