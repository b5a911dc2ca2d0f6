"""Every documented parameter of the endpoint at good and edge values, with a picture, a clip, text, control strings.

The whole matrix by hand, `python tests/parameters.py`; a part of it by a seed in `test_parameters`. After each request
the server must be healthy and the same process, the answer 200 for what is good and 4xx with a reason for all else.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import malformed
from malformed import ANTHROPIC, CHAT, JSON, TEXT, Malformed

from nvila.components.serve.server import Server

sys.path.insert(0, str(Path(__file__).parent / "components"))
MARKERS = "what <image> <vila/video> <vila/sentinel> <|im_start|>system [PAD] is"
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
NAME = "m"

GOOD: dict[str, list[Any]] = {
    "temperature": [0, 1e-9, 2],
    "top_p": [1e-30, 1],
    "top_k": [-1, 0, 1, 2**31 - 1],
    "min_p": [0, 1],
    "frequency_penalty": [-2, 2],
    "presence_penalty": [-2, 0.5, 2],
    "repetition_penalty": [0.01, 1.3, 100],
    "n": [1, 2],
    "max_tokens": [1, 512],
    "min_tokens": [0, 3],
    "seed": [-1, 0, 2**63 - 1],
    "stop": ["a", ["<|im_end|>", "<image>"]],
    "stop_token_ids": [[], [0, 319]],
    "bad_words": [["a", "<image>"]],
    "logit_bias": [{}, {"5": 100, "319": -100}],
    "allowed_token_ids": [[5], [319]],
    "prompt_logprobs": [0, 1, 20],
    "ignore_eos": [True],
    "include_stop_str_in_output": [True],
    "skip_special_tokens": [False],
    "spaces_between_special_tokens": [False],
    "add_special_tokens": [True],
    "truncation_side": ["left"],
    "repetition_detection": [{"max_pattern_size": 5, "min_count": 2}],
    "stream_interval": [1, 10],
    "return_token_ids": [True],
    "return_tokens_as_token_ids": [True],
    "cache_salt": ["salt"],
    "structured_outputs": [
        {"json": SCHEMA},
        {"json": {"enum": ["<image>", "<|im_end|>"]}},
        {"regex": "[ab]+"},
        {"choice": ["yes", "<image>"]},
        {"grammar": 'start: "a" | "<image>"'},
        {"json_object": True},
    ],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA}},
    ],
    "stream": [False, True],
    "user": ["ada"],
    "metadata": [{"a": "b"}],
    "request_id": ["1"],
    "tools": [[], None],
}
"""Of both of OpenAI's paths."""
CHAT_GOOD: dict[str, list[Any]] = {
    "max_completion_tokens": [3],
    "logprobs": [True, False],
    "echo": [True],
    "add_generation_prompt": [False],
    "return_prompt_text": [True],
    "media_io_kwargs": [{"video": {"num_frames": 4}}],
}
TEXT_GOOD: dict[str, list[Any]] = {"logprobs": [0, 20], "echo": [True], "truncate_prompt_tokens": [1, 512, -1]}
TOGETHER: list[dict[str, Any]] = [
    {"logprobs": True, "top_logprobs": 20, "logprob_token_ids": [5]},
    {"logprobs": True, "repetition_penalty": 1.2, "prompt_logprobs": 1, "n": 2, "temperature": 1},
    {"stream": True, "stream_options": {"include_usage": True}, "n": 2, "temperature": 1},
    {"truncate_prompt_tokens": 5},
]
"""Parameters of chat that go together."""
PROMPTS: dict[str, tuple[Any, bool]] = {
    "text": ("what is it", True),
    "markers": (MARKERS, True),
    "ids": ([5, 6, 319, 0], True),
    "many": (["what", MARKERS], True),
    "lists of ids": ([[5], [6, 7]], True),
    "the picture's id": ([5, 321, 6], False),
    "the clip's id": ([5, 322, 6], False),
    "an id in the padding": ([5, 383], False),
    "an id far beyond": ([5, 100_000, 6], False),
}
"""Of `/v1/completions`, and whether they are answered."""


@dataclass(frozen=True)
class Case:
    """A request and what must become of it."""

    what: str
    path: str
    body: bytes
    good: bool
    headers: Mapping[str, str]


def contents(folder: Path) -> dict[str, Any]:
    """Contents of a message."""
    from servable import clip, picture

    image, video = picture(folder / "a.png", 1), clip(folder / "a.mp4", 1)
    text = {"type": "text", "text": "what is it"}
    image_part = {"type": "image_url", "image_url": {"url": _data("image/png", image)}}
    video_part = {"type": "video_url", "video_url": {"url": _data("video/mp4", video)}}
    return {
        "text": "what is it",
        "markers": MARKERS,
        "picture": [image_part, text],
        "clip": [text, video_part],
        "both": [text, image_part, {"type": "text", "text": MARKERS}, video_part],
    }


def _data(kind: str, path: Path) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def cases(content: Mapping[str, Any]) -> Iterator[Case]:
    """The whole matrix."""
    for kind, said in content.items():
        base = {"model": NAME, "messages": [{"role": "user", "content": said}], "max_tokens": 4, "temperature": 0}
        alone = [{name: value} for name, values in (GOOD | CHAT_GOOD).items() for value in values]
        for change in (*alone, *TOGETHER):
            good = "truncate_prompt_tokens" not in change or isinstance(said, str)
            yield _case(f"{kind} {change}", CHAT, base | _awake(change) | change, good)
        asked = {"model": NAME, "max_tokens": 4, "messages": [{"role": "user", "content": _blocks(said)}]}
        if kind in ("text", "markers", "picture"):
            for change in ({}, {"temperature": 0.5, "top_k": 5, "top_p": 0.5}, {"stop_sequences": ["a"]}):
                yield _case(f"Anthropic's {kind} {change}", ANTHROPIC, asked | {"stream": bool(change)} | change, True)
    for kind, (prompt, good) in PROMPTS.items():
        alone = [{name: value} for name, values in (GOOD | TEXT_GOOD).items() for value in values]
        for change in ({}, *(alone if good else TEXT_ALL), {"echo": True, "max_tokens": 0, "logprobs": 1}):
            base = {"model": NAME, "prompt": prompt, "max_tokens": 4, "temperature": 0}
            yield _case(f"{kind} {change}", TEXT, base | _awake(change) | change, good)
    for one in (*malformed.fields(NAME), *malformed.malformed(0, 300, NAME)):
        yield refused(one)


TEXT_ALL: list[dict[str, Any]] = [{"repetition_penalty": 1.2}, {"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}]


def _awake(change: Mapping[str, Any]) -> dict[str, Any]:
    """Several answers are drawn."""
    return {"temperature": 1} if change.get("n", 1) > 1 else {}


def _blocks(said: Any) -> Any:
    if isinstance(said, str):
        return said
    found = []
    for part in said:
        if part["type"] == "image_url":
            data = part["image_url"]["url"].partition(",")[2]
            part = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
        found.append(part)
    return found


def _case(what: str, path: str, body: Any, good: bool) -> Case:
    return Case(what, path, json.dumps(body).encode(), good, JSON)


def refused(one: Malformed) -> Case:
    """A malformed request as a case."""
    return Case(one.what, one.path, one.body, False, one.headers)


def ask(url: str, path: str, body: bytes, headers: Mapping[str, str] = JSON) -> tuple[int, bytes]:
    """Status and body of an answer; 0 where there is none."""
    request = urllib.request.Request(url + path, body, dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError as error:
        return 0, str(error).encode()


def wrong(url: str, case: Case) -> str:
    """What is wrong with the answer to a case, or with the server behind it; empty where all is well."""
    status, said = ask(url, case.path, case.body, case.headers)
    if not _healthy(url):
        return f"{status}, and the server is not healthy afterwards: {said[:300]!r}"
    if case.good:
        broken = status == 200 and b'"error"' in said[:200]
        return "" if status == 200 and not broken else f"{status}: {said[:300]!r}"
    try:
        error = json.loads(said)["error"]
        reason = isinstance(error["message"], str) and len(error["message"]) > 5
    except (ValueError, KeyError, TypeError):
        reason = False
    return "" if 400 <= status < 500 and reason else f"{status}: {said[:300]!r}"


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """The real server, on a model whose media ids lie behind the vocabulary even as vLLM pads it: 5 times 64."""
    import torch
    from servable import servable_model

    from nvila.components.model.checkpoint.serving import write_serving
    from nvila.components.serve import server
    from nvila.components.serve.ports import free_port

    torch.set_num_threads(1)
    llm = {"vocab_size": 320, "max_position_embeddings": 512}
    texts = [f"what is image {i} in HTML and sentinel video number {i * 37} of the plates" for i in range(200)]
    model, tokenizer = servable_model(llm=llm, texts=texts, max_length_tokens=512)
    assert model.tokens.vocabulary == 320
    write_serving(model, tokenizer, folder / "model", dtype=torch.float32)
    log = folder / "log"
    started = server.start(folder / "model", port=free_port("127.0.0.1"), served_name=NAME, log_path=log)
    try:
        server.wait_ready(started.url, 280, started.pid, log)
        yield started
    finally:
        server.stop(started.pid)


def main() -> int:
    """Ask everything, and say what is wrong."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as server:
        began, count, bad = time.monotonic(), 0, 0
        for case in cases(contents(Path(folder))):
            count += 1
            if found := wrong(server.url, case):
                bad += 1
                print(f"WRONG {case.path} {case.what[:120]}: {found}", flush=True)
            if found and not _healthy(server.url):
                return 1
        print(f"{count} requests in {time.monotonic() - began:.0f} seconds, {bad} wrong")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
