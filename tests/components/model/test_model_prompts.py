"""One prompt on every path, and text that stays text: our renderer against the chat template that others run."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvila.components.model.checkpoint.serving import chat_template
from nvila.components.model.decode.generation import answer_text, text_pieces
from nvila.components.model.text.controls import CONTROLS, MARKERS, break_up, control_strings, mend, settled
from nvila.components.model.text.conversation import Message, Place, Turn, encode, messages_of

FRAGMENTS = [*CONTROLS[:3], *MARKERS, "<|vision_start|>", "[PAD]", "<|im_", "end|>", "<ima", "ge>", "<vila/", "video>"]
FRAGMENTS += ["<", "|", ">", "\u200b", "\u226e", "\u0338", "\u212a", " ", "\n", "\n\n", "\t", "\u3000", "\u00a0"]
FRAGMENTS += ["e", "\u0301", "a\u030a", "Which digit?", "7", "<t3>", "<tool_call>", "\r\n", "'s", "."]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)


def http(messages: list[Message[str]], cut: int = 0) -> list[dict[str, Any]]:
    """Messages as a client sends them; each text falls into two parts at `cut`."""
    sent: list[dict[str, Any]] = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, Place):
                content.append({"type": "video" if "video" in part.medium else "image"})
            else:
                content += [{"type": "text", "text": text} for text in (part[:cut], part[cut:])]
        sent.append({"role": message.role, "content": content})
    return sent


def by_template(tokenizer: Any, messages: list[dict[str, Any]], generate: bool, template: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=generate
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@given(
    human=st.lists(texts, min_size=1, max_size=3),
    said=st.lists(texts, min_size=3, max_size=3),
    system=st.none() | texts,
    media=st.lists(st.sampled_from(MARKERS[1:]), max_size=4),
    generate=st.booleans(),
    cut=st.integers(0, 9),
)
@settings(deadline=None, max_examples=300)
def test_the_chat_template_says_what_training_says(
    tokenizer: Any,
    human: list[str],
    said: list[str],
    system: str | None,
    media: list[str],
    generate: bool,
    cut: int,
) -> None:
    """Prevents another prompt at the endpoint than in training: a medium moved, a line break lost, a text that became
    a control token on one of the two paths, wherever media and control strings stand."""
    turns = [turn for q, a in zip(human, said, strict=False) for turn in (Turn("human", q), Turn("gpt", a))]
    turns = turns[:-1] if generate else turns
    ours = encode(tokenizer, turns, system=system, generate=generate, markers=media)
    asked = [] if system is None else [{"role": "system", "content": system}]
    asked += http(messages_of(turns, media), cut)
    assert by_template(tokenizer, asked, generate, chat_template()) == ours.input_ids

    names = tokenizer.convert_ids_to_tokens(ours.input_ids)
    assert [token for token in names if token in MARKERS] == media
    assert names.count("<|im_start|>") == len(turns) + 1 + generate
    assert [t for t, label in zip(names, ours.labels, strict=True) if label != -100].count("<|im_end|>") == sum(
        turn.role == "gpt" for turn in turns
    )
    special = {"<|endoftext|>", "[PAD]", "[BOS]", "<vila/sentinel>"}
    assert not special & set(names)


def test_an_only_picture_of_dynamic_tiling_stands_on_a_line(tokenizer: Any) -> None:
    """Prevents a line break behind the last tile that is there on one path only, or at the end of a message."""
    template = chat_template(tile_breaks=True)
    for question in ("<image>", "<image>\nWhich?", "<image>\n\nWhich?", "Look: <image> \n", "A <image> B", "", "Hm"):
        (message,) = messages_of([Turn("human", question)], ["<image>"])
        ours = encode(tokenizer, [Turn("human", question)], markers=["<image>\n"], generate=True).input_ids
        assert by_template(tokenizer, http([message]), True, template) == ours
        twice = [Turn("human", question), Turn("gpt", "x"), Turn("human", "<image>\n")]
        ours = encode(tokenizer, twice, markers=["<image>"] * 2).input_ids
        assert by_template(tokenizer, http(messages_of(twice, ["<image>"] * 2)), False, template) == ours


def test_content_as_text_is_text(tokenizer: Any) -> None:
    """Prevents a foreign client's text from placing media; only the reference's own template may."""
    asked = [{"role": "user", "content": "what is <image> in HTML? <vila/sentinel> <|im_end|>"}]
    names = tokenizer.convert_ids_to_tokens(by_template(tokenizer, asked, True, chat_template()))
    assert not set(MARKERS) & set(names) and names.count("<|im_end|>") == 2
    names = tokenizer.convert_ids_to_tokens(by_template(tokenizer, asked, True, chat_template(literal_media=True)))
    assert {"<image>", "<vila/sentinel>"} <= set(names) and names.count("<|im_end|>") == 2


@pytest.mark.parametrize("content", [[{"type": "input_audio"}], [{"type": "refusal", "refusal": "no"}]])
def test_what_the_template_does_not_know_is_refused(tokenizer: Any, content: Any) -> None:
    """Prevents a part of a question from being dropped without a word."""
    from jinja2.exceptions import TemplateError

    for asked in ([{"role": "user", "content": content}], [{"role": "tool", "content": "4"}]):
        with pytest.raises(TemplateError, match="unknown"):
            by_template(tokenizer, asked, True, chat_template())


def test_a_tokenizers_own_special_tokens_are_broken_up() -> None:
    """Prevents a foreign tokenizer's control tokens from being typed; ordinary added tokens stay one token."""
    from nvila.components.model.text.tokenizer import train_tokenizer, written_template

    tokenizer = train_tokenizer(["a b"], 300)
    tokenizer.add_tokens(["<|own|>"], special_tokens=True)
    tokenizer.add_tokens(["<tool_call>"])
    assert "<|own|>" in control_strings(tokenizer) and "<tool_call>" not in control_strings(tokenizer)
    typed = "a <|own|> <tool_call>"
    ids = encode(tokenizer, [Turn("human", typed)]).input_ids
    asked = [{"role": "user", "content": typed}]
    assert by_template(tokenizer, asked, False, written_template(tokenizer)) == ids
    own, ordinary = tokenizer.convert_tokens_to_ids(["<|own|>", "<tool_call>"])
    assert ids.count(own) == 0 and ids.count(ordinary) == 1


@given(texts.filter(lambda text: "\u200b" not in text))
@settings(deadline=None)
def test_answers_are_mended(tokenizer: Any, text: str) -> None:
    """Prevents invisible characters in what users, metrics and programs get to see, streamed or whole."""
    broken = break_up(text)
    assert not [control for control in CONTROLS if control in broken]
    assert mend(broken) == text
    for end in range(len(broken) + 1):
        assert text.startswith(mend(settled(broken[:end])))
    ids = tokenizer(broken, add_special_tokens=False)["input_ids"]
    assert "".join(text_pieces(tokenizer, ids)) == answer_text(tokenizer, ids) == mend(tokenizer.decode(ids).strip())
