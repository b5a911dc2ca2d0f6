"""Requests that the endpoint must refuse with 4xx and a reason, made from a seed; load tests mix them among good ones.

`malformed(seed, count)` gives as many as are asked for; the model they name exists, and what is wrong is said of each.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

CHAT, TEXT, ANTHROPIC = "/v1/chat/completions", "/v1/completions", "/v1/messages"
JSON = {"Content-Type": "application/json"}
BEYOND: Any = 10**6
"""A token id that no vocabulary of a small model has."""


@dataclass(frozen=True)
class Malformed:
    """A request by POST."""

    what: str
    """What is wrong with it."""
    path: str
    headers: Mapping[str, str]
    body: bytes


FIELDS: dict[str, list[Any]] = {
    "temperature": [-0.1, 2.1, "hot", True, [1]],
    "top_p": [0, 1.5, -1],
    "top_k": [-2, 1.5, 2**40],
    "min_p": [-0.1, 1.1],
    "frequency_penalty": [-2.1, 2.1, "0"],
    "presence_penalty": [3, {}],
    "repetition_penalty": [0, -1, 1e30],
    "n": [0, -1, 10_000, 1.5],
    "max_tokens": [-1, 10**9, 2**70, "16", 1.5],
    "min_tokens": [-1, "1"],
    "seed": [2**63, -(2**63) - 1, 0.5],
    "stop": [[""], [1], ["x"] * 100, 5, {"a": 1}],
    "stop_token_ids": [[-1], [BEYOND], ["a"]],
    "bad_words": [[""], "a", [5]],
    "logit_bias": [{"-1": 1}, {str(BEYOND): 1}, {"x": 1}, {"5": 1000}, {"5": "1"}, [5]],
    "allowed_token_ids": [[], [-1], [BEYOND]],
    "logprob_token_ids": [[BEYOND], [5]],
    "prompt_logprobs": [-1, 21, "all"],
    "truncate_prompt_tokens": [0, -2, 10**9],
    "truncation_side": ["top"],
    "stream_options": [{"include_usage": True}, 1],
    "repetition_detection": [{"max_pattern_size": 2**40, "min_count": 2}, {"max_pattern_size": 3}, 5],
    "stream_interval": [0, 2**70],
    "cache_salt": ["a/b", 5, "x" * 200],
    "ignore_eos": ["yes"],
    "structured_outputs": [
        {},
        {"json": {"type": "object"}, "regex": "a"},
        {"json": {"$ref": "#"}},
        {"json": {"not": {}}},
        {"json": {"type": "array", "minItems": 10**9}},
        {"json": "{"},
        {"json": True},
        {"regex": "("},
        {"regex": "((a{100}){100}){100}"},
        {"choice": []},
        {"grammar": "start: nothing"},
        {"grammar": ""},
        {"json_object": False},
        {"structural_tag": "{}"},
    ],
    "response_format": [
        "json",
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "a"}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object", "dependentRequired": {}}}},
        {"type": "structural_tag", "structures": [], "triggers": []},
    ],
    "tools": [[{"type": "function", "function": {"name": "f"}}]],
    "tool_choice": ["required"],
    "use_beam_search": [True],
    "best_of": [3],
    "priority": [1],
    "prompt_embeds": ["AAAA"],
    "kv_transfer_params": [{"do_remote_decode": True}],
    "vllm_xargs": [{"a": 1}],
    "mm_processor_kwargs": [{"blank": True}],
    "guided_json": [{"type": "object"}],
    "reasoning_effort": ["high"],
    "watermarking": [True],
    "temprature": [1],
}
"""Values that no field has on either of OpenAI's paths."""
CHAT_FIELDS: dict[str, list[Any]] = {
    "messages": [[], "Why?", [5], None, [{"role": "user"}], [{"content": "a"}], [{"role": "tool", "content": "a"}]],
    "top_logprobs": [3, 21, -1],
    "logprobs": [5],
    "max_completion_tokens": [0, -1, 10**9],
    "continue_final_message": [True],
    "chat_template": ["{{ messages }}"],
    "chat_template_kwargs": [{"a": 1}],
    "documents": [[{"title": "a"}]],
    "modalities": [["audio"]],
}
TEXT_FIELDS: dict[str, list[Any]] = {
    "prompt": ["", [], [[]], [""], [BEYOND], [-1], [5, "a"], [[5], [BEYOND]], None, 5, {"a": 1}, ["a"] * 2000],
    "logprobs": [21, -1, True],
    "suffix": ["x"],
    "max_tokens": [0],
}
PARTS: list[Any] = [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    {"type": "image_url", "image_url": {"url": ""}},
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}},
    {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
    {"type": "image_url", "image_url": {"url": "data:image/png,%%%"}},
    {"type": "image_url"},
    {"type": "image_embeds", "image_embeds": "AAAA"},
    {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
    {"type": "video_url", "video_url": 5},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "prompt_embeds", "data": "AAAA"},
    {"type": "text"},
    {"type": "text", "text": 5},
    {"type": "text", "text": "a", "colour": "red"},
    {"type": ["text"]},
    5,
    None,
]
"""Parts that no message has, or whose media cannot be decoded."""


def malformed(seed: int, count: int, model: str = "m") -> Iterator[Malformed]:
    """As many requests, all of which must be answered with 4xx.

    Args:
        seed: of the choice among them.
        count: how many.
        model: the name that is served.
    """
    choose = random.Random(seed)
    makers = (_field, _field, _field, _part, _json, _bytes, _header, _path, _anthropic)
    for _ in range(count):
        yield choose.choice(makers)(choose, model)


def _good(path: str, model: str) -> dict[str, Any]:
    asked: dict[str, Any] = {"model": model, "max_tokens": 2}
    return asked | ({"prompt": "Why"} if path == TEXT else {"messages": [{"role": "user", "content": "Why"}]})


def _request(what: str, path: str, content: Any, headers: Mapping[str, str] = JSON) -> Malformed:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Malformed(what, path, headers, body)


def fields(model: str = "m") -> Iterator[Malformed]:
    """Every field at every value that it does not have."""
    for path, own in ((CHAT, CHAT_FIELDS), (TEXT, TEXT_FIELDS)):
        for name, values in (*FIELDS.items(), *own.items()):
            for value in values:
                yield _request(f"{name}={value!r:.60}", path, _good(path, model) | {name: value})


_FIELDS = list(fields())


def _field(choose: random.Random, model: str) -> Malformed:
    one = choose.choice(_FIELDS)
    return _request(one.what, one.path, json.loads(one.body) | {"model": model})


def _part(choose: random.Random, model: str) -> Malformed:
    part = choose.choice(PARTS)
    content = _good(CHAT, model) | {"messages": [{"role": "user", "content": ["Why", part]}]}
    return _request(f"part {part!r:.80}", CHAT, content)


def _json(choose: random.Random, model: str) -> Malformed:
    path = choose.choice((CHAT, TEXT, ANTHROPIC))
    good = json.dumps(_good(path, model)).encode()
    damages: dict[str, bytes] = {
        "cut": good[: choose.randrange(len(good))],
        "a list": b"[" + good + b"]",
        "twice": good + good,
        "a key twice": good[:-1] + b', "max_tokens": 3}',
        "not a number": good[:-1] + b', "temperature": NaN}',
        "infinite": good[:-1] + b', "temperature": 1e999}',
        "long number": good[:-1] + b', "seed": ' + b"9" * 5000 + b"}",
        "deep": good[:-1] + b', "user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "half a character": good.replace(b"Why", b"\\ud800"),
        "a comment": good[:-1] + b", // why\n}",
    }
    what = choose.choice(list(damages))
    return _request(what, path, damages[what])


def _bytes(choose: random.Random, model: str) -> Malformed:
    path = choose.choice((CHAT, TEXT, ANTHROPIC))
    good = json.dumps(_good(path, model)).encode()
    damages = {
        "random bytes": choose.randbytes(choose.randrange(1, 2000)),
        "not UTF-8": good.replace(b"Why", b"\xff\xfe"),
        "UTF-16": good.decode().encode("utf-16"),
        "NUL": good + b"\0",
        "empty": b"",
    }
    what = choose.choice(list(damages))
    return _request(what, path, damages[what])


def _header(choose: random.Random, model: str) -> Malformed:
    kind = choose.choice(("text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "image/png"))
    return _request(f"content type {kind}", CHAT, _good(CHAT, model), {"Content-Type": kind})


def _path(choose: random.Random, model: str) -> Malformed:
    paths = (
        *("/docs", "/tokenize", "/invocations", "/v1/embeddings", "/v1/models", "/scale_elastic_ep", "/v1/responses"),
        *("//v1/chat/completions", "/v1/chat/completions/", "/v1/chat%2fcompletions", "/V1/CHAT/COMPLETIONS"),
    )
    path = choose.choice(paths)
    return _request("path", path, _good(CHAT, model))


def _anthropic(choose: random.Random, model: str) -> Malformed:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    changes: dict[str, dict[str, Any]] = {
        "no max_tokens": {"max_tokens": None},
        "tools": {"tools": [{"name": "f", "input_schema": {}}]},
        "thinking": {"thinking": {"type": "enabled", "budget_tokens": 2048}},
        "document": {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
        "no picture": {"messages": [{"role": "user", "content": [picture]}]},
        "schema": {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
        "n": {"n": 2},
        "system": {"system": [{"type": "image"}]},
    }
    what = choose.choice(list(changes))
    return _request(f"Anthropic's {what}", ANTHROPIC, _good(ANTHROPIC, model) | changes[what])
