from typing import Any

from nvila.components.model.text.conversation import Turn, encode, render
from nvila.components.model.text.templates import stop_tokens

TALK = [Turn("human", "<image>\nA?"), Turn("gpt", "b"), Turn("human", "C?"), Turn("gpt", "d")]


def test_labels(tokenizer: Any) -> None:
    """Prevents prompts from being supervised, or ends of answers from not being."""
    encoded = encode(tokenizer, TALK)
    assert tokenizer.decode([t for t in encoded.labels if t != -100]) == "b<|im_end|>d<|im_end|>"


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
