"""Bodies of requests, judged without a server: what goes on to vLLM, and what is refused with which reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import malformed
import pytest

from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.data.sampling import Sampling
from nvila.components.model.decode.structured import SPACING
from nvila.components.model.text.tokenizer import train_tokenizer
from nvila.components.serve import parameters
from nvila.components.serve.facts import Facts, tokens_of
from nvila.components.serve.parameters import Bounds
from nvila.components.serve.refusal import Refusal
from nvila.components.serve.requests import is_quick, judge

CHAT, TEXT, ANTHROPIC = malformed.CHAT, malformed.TEXT, malformed.ANTHROPIC
HI = {"messages": [{"role": "user", "content": "hi"}]}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
Judging = Callable[..., Any]


@pytest.fixture(scope="module")
def facts() -> Facts:
    tokenizer = train_tokenizer(["what is an image"], 300)
    vocabulary = len(tokenizer) - 3
    markers = frozenset(range(vocabulary, vocabulary + 3))
    return Facts(vocabulary, 64, 12, Sampling(4), markers=markers, tokens=tokens_of(tokenizer))


@pytest.fixture
def judged(facts: Facts) -> Judging:
    """What vLLM is given for a body."""

    def judging(path: str, body: Any, **settings: Any) -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return json.loads(judge(path, content, Bounds(facts, EndpointSettings(**settings))).body)

    return judging


def test_whatever_is_malformed_is_refused_with_a_reason(judged: Judging) -> None:
    """Each of these was a dead engine, an error of the server, or an answer that ignored what was asked."""
    asked = {one.body: one for one in (*malformed.fields(), *malformed.malformed(0, 500))}.values()
    late = {"path", "content type"}
    answered = []
    for one in asked:
        if one.path not in (CHAT, TEXT, ANTHROPIC) or one.what.startswith((*late, "Anthropic's no picture")):
            continue  # the middleware's, or the decoder's, business
        if one.what.startswith("part ") and "url" in one.what and isinstance(_address(one), str) and _address(one):
            continue
        try:
            judged(one.path, one.body)
            answered.append((one.path, one.what))
        except Refusal as refusal:
            assert refusal.status == 400 and refusal.message and "Traceback" not in refusal.message
            assert len(refusal.message) < 700, "it can be read"
    assert not answered


def _address(one: malformed.Malformed) -> Any:
    part = json.loads(one.body)["messages"][0]["content"][1]
    source = part.get("image_url", part.get("video_url"))
    return source.get("url") if isinstance(source, dict) else source


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"temperature": 3}, "temperature", "less than or equal to 2, not 3"),
        ({"allowed_token_ids": [5, 999]}, "allowed_token_ids.1", "token id"),
        ({"tools": [{"type": "function"}]}, "tools", "not trained to call tools"),
        ({"guided_json": {"a": 1}}, "guided_json", "structured_outputs"),
        ({"n": 17}, "n", "at most 16"),
        ({"n": 16, "max_tokens": 60, "temperature": 1}, "max_tokens", "at most 900 tokens"),
        ({"max_tokens": 65}, "max_tokens", "at most 64"),
        ({"messages": [{"role": "user", "content": "x" * 800}]}, None, "hold at most 768"),
        ({"messages": [{"role": "user", "content": [PICTURE] * 4}]}, "messages", "at most 3"),
        ({"messages": [{"role": "system", "content": [PICTURE]}]}, "messages.0.content.0.image_url", "of the user"),
        ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs.json", "refer to itself"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json", "Unimplemented"),
        ({"structured_outputs": {"regex": r"a<\|im_end\|>"}}, "structured_outputs.regex", "cannot be held"),
        ({"media_io_kwargs": {"video": {"num_frames": 3}}}, "media_io_kwargs", "takes 4 frames"),
        (
            {"messages": [{"role": "user", "content": [PICTURE]}], "truncate_prompt_tokens": 5},
            "truncate_prompt_tokens",
            "pictures",
        ),
    ],
)
def test_a_refusal_names_the_field_and_what_to_do(
    judged: Judging, change: dict[str, Any], param: str | None, words: str
) -> None:
    """A client that is told nothing tries again."""
    with pytest.raises(Refusal) as refusal:
        judged(CHAT, HI | change, max_media=3, max_tokens=900)
    assert refusal.value.param == param and words in refusal.value.message


def test_frames_of_a_clip_count_one_by_one(judged: Judging) -> None:
    """A thousand pictures in one address were one clip."""
    clip = {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AA,AA,AA,AA"}}
    body = {"messages": [{"role": "user", "content": [clip]}]}
    assert judged(CHAT, body, max_media=4)
    with pytest.raises(Refusal, match="4 pictures"):
        judged(CHAT, body, max_media=3)


def test_parts_keep_their_order_and_lose_what_is_not_known(judged: Judging) -> None:
    """One client's `uuid` was the cache key of another's picture; a picture after its question is another question."""
    clip = {"type": "video_url", "video_url": "data:video/mp4;base64,AAAA"}
    content = ["a", PICTURE | {"uuid": "u", "detail": "low"}, {"type": "text", "text": "b"}, clip | {"uuid": "v"}, "c"]
    kept = judged(CHAT, {"messages": [{"role": "user", "content": content, "name": "ada"}]})["messages"]
    assert kept == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                PICTURE,
                {"type": "text", "text": "b"},
                {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
                {"type": "text", "text": "c"},
            ],
        }
    ]


@pytest.mark.parametrize("spelling", ["text", "object", "input_image", "no type"])
def test_a_picture_is_taken_in_every_spelling_of_clients(judged: Judging, spelling: str) -> None:
    """Libraries write the address as a text or an object, and a type or none."""
    address = PICTURE["image_url"]["url"]  # type: ignore[index]
    part: Any = {
        "text": {"type": "image_url", "image_url": address},
        "object": PICTURE,
        "input_image": {"type": "input_image", "image_url": address, "detail": "auto"},
        "no type": {"image_url": {"url": address}},
    }[spelling]
    assert judged(CHAT, {"messages": [{"role": "user", "content": [part]}]})["messages"][0]["content"] == [PICTURE]


def test_an_answer_that_was_given_can_be_sent_back(judged: Judging) -> None:
    """Clients append the message of an answer as it came, with all its empty fields."""
    answer = {"role": "assistant", "content": "so", "refusal": None, "annotations": None, "audio": None}
    answer |= {"function_call": None, "reasoning": None, "tool_calls": []}
    kept = judged(CHAT, {"messages": [{"role": "developer", "content": "be brief"}, *HI["messages"], answer]})
    assert kept["messages"][0]["role"] == "system"
    assert kept["messages"][2] == {"role": "assistant", "content": "so"}


def test_what_changes_no_answer_is_dropped(judged: Judging) -> None:
    """Clients send these always, and null where they mean nothing."""
    nothing = dict.fromkeys(parameters.DROPPED, "x") | dict.fromkeys(parameters.REFUSED)
    asked = (
        HI
        | nothing
        | {"unheard_of": None, "tools": [], "tool_choice": "none", "priority": 0, "best_of": 1, "temperature": None}
    )
    assert judged(CHAT, asked) == HI | {"max_tokens": 64}


def test_text_stays_text_in_raw_prompts_and_words(judged: Judging) -> None:
    """A marker in a raw prompt ended the engine; a bad word that is one would forbid a token that has no logit."""
    kept = judged(TEXT, {"prompt": ["a <image>", "<|im_end|>"], "bad_words": ["<vila/video>"]})
    assert kept["prompt"] == ["a <\u200bimage>", "<\u200b|im_end|>"]
    assert kept["bad_words"] == ["<\u200bvila/video>"] and kept["max_tokens"] == 16


@pytest.mark.parametrize(
    ("asked", "at"),
    [
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["<image>"]}}}},
            {"enum": ["<\u200bimage>"]},
        ),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, {"type": "integer"}),
    ],
)
def test_json_answers_have_one_spacing_and_no_control_strings(judged: Judging, asked: Any, at: Any) -> None:
    """White space until the length limit; and an engine that could not go on behind a control string's beginning."""
    assert judged(CHAT, HI | asked)["structured_outputs"] == {"json": at | {"x-guidance": SPACING}}


def test_how_many_tokens_where_none_are_said(judged: Judging) -> None:
    """Without a bound of our own an answer runs to the end of the model's context, times n."""
    assert judged(CHAT, HI)["max_tokens"] == 64
    assert judged(CHAT, HI | {"n": 4, "temperature": 1}, max_tokens=100)["max_tokens"] == 25
    assert judged(CHAT, HI | {"max_tokens": 9, "max_completion_tokens": 7})["max_tokens"] == 7


def test_messages_of_anthropic_clients(judged: Judging) -> None:
    """The second protocol must not be a way around the rules of the first."""
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    content = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "image", "source": source},
    ]
    asked = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": content}], "metadata": {}}
    kept = judged(ANTHROPIC, asked | {"system": "be brief", "stop_sequences": ["x"], "thinking": {"type": "disabled"}})
    assert [part["type"] for part in kept["messages"][0]["content"]] == ["text", "image"]
    assert kept["messages"][0]["content"][1]["source"]["url"] == "data:image/png;base64,AAAA"
    assert kept["system"] == "be brief" and "metadata" not in kept and "thinking" not in kept
    with pytest.raises(Refusal, match="at most 0"):
        judged(ANTHROPIC, asked, max_media=0)


def test_the_facts_of_a_serving_folder(tmp_path: Path) -> None:
    """A vocabulary that is taken from the tokenizer lets ids through that have no logit."""
    import torch
    from servable import servable_model

    from nvila.components.model.checkpoint.serving import write_serving_files

    model, tokenizer = servable_model()
    write_serving_files(model, tokenizer, tmp_path, torch.float32, config=model.config)
    facts = Facts.of(tmp_path)
    assert facts.vocabulary == model.config.llm["vocab_size"] == min(facts.markers)
    assert (facts.context, facts.sampling) == (256, Sampling(4))
    assert facts.tokens().vocab_size >= facts.vocabulary and facts.tokens() is facts.tokens()


def test_a_grammar_is_never_judged_in_the_event_loop() -> None:
    """However its name is spelt: everybody waits while one request's schema is compiled."""
    assert is_quick(b'{"prompt": "Why?"}') and not is_quick(b'"' + b"a" * 4096)
    for name in ("structured_outputs", "response_format", "output_config", "\\u0072esponse_format"):
        assert not is_quick(f'{{"{name}": {{}}}}'.encode())
