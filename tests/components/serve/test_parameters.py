"""One real vLLM server behind the middleware: no request ends it, and each is answered or refused with a reason."""

from __future__ import annotations

import ast
import http.client
import json
import random
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from malformed import CHAT, TEXT, malformed
from parameters import MARKERS, NAME, PROMPTS, Case, ask, cases, contents, refused, served, wrong
from servable import WITH_VLLM

from nvila.components.model.text.controls import break_up, mend
from nvila.components.model.text.conversation import IMAGE_TOKEN, VIDEO_TOKEN, Turn, render
from nvila.components.serve import parameters
from nvila.components.serve.interpreter import serve_python
from nvila.components.serve.server import Server

pytestmark = WITH_VLLM
SEED, SHARE = 0, 0.15


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return contents(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture
def url(server: Server) -> str:
    return server.url


def test_no_request_ends_the_engine(url: str, content: dict[str, Any]) -> None:
    """One ordinary request with a picture, or an id without an embedding, ended the server for everybody."""
    choose = random.Random(SEED)
    chosen: dict[str, Case] = {}
    for case in cases(content):
        if (case.path == TEXT and case.what.endswith(" {}")) or choose.random() < SHARE:
            chosen[case.what] = case
    assert all(f"{kind} {{}}" in chosen for kind in PROMPTS), "case 22: each kind of prompt"
    found = {what: said for what, case in chosen.items() if (said := wrong(url, case))}
    assert not found


def test_malformed_requests_are_refused(url: str) -> None:
    """A load test that mixes these must see 4xx for each, with a reason."""
    found = {one.what: said for one in malformed(7, 60, NAME) if (said := wrong(url, refused(one)))}
    assert not found


@pytest.mark.parametrize("order", ["tp", "pt", "tpt", "ptct", "tptctp", "ccp"])
def test_the_prompt_is_that_of_training(url: str, content: dict[str, Any], order: str) -> None:
    """A picture that moves to the front of the texts is another question than the one that was trained and measured."""
    texts = iter(["Look at ", "\nand then ", MARKERS, " what? "])
    parts: list[dict[str, Any]] = []
    markers, turn = [], ""
    for kind in order:
        part = {"p": content["picture"][0], "c": content["clip"][1]}.get(kind) or {"type": "text", "text": next(texts)}
        marker = {"p": IMAGE_TOKEN, "c": VIDEO_TOKEN}.get(kind)
        parts.append(part)
        markers += [marker] if marker else []
        turn += marker or break_up(part["text"])
    asked = {"model": NAME, "max_tokens": 1, "return_prompt_text": True}
    status, answer = ask(url, CHAT, json.dumps(asked | {"messages": [{"role": "user", "content": parts}]}).encode())
    assert status == 200
    assert json.loads(answer)["prompt_text"] == render([Turn("human", turn)], generate=True, markers=markers)


def test_json_answers_end(url: str) -> None:
    """A weak model filled its answer with white space until the length limit."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": ["<image>"]}}}
    schema |= {"required": ["a", "b"], "additionalProperties": False}  # type: ignore[dict-item]
    for seed in range(4):
        asked = {"model": NAME, "max_tokens": 60, "temperature": 2, "seed": seed, "messages": _hi()}
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        choice = json.loads(ask(url, CHAT, json.dumps(asked).encode())[1])["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert mend(choice["message"]["content"]) in ('{"a": true, "b": "<image>"}', '{"a": false, "b": "<image>"}')


def _hi() -> list[dict[str, str]]:
    return [{"role": "user", "content": "hi"}]


def test_every_parameter_of_vllm_is_decided() -> None:
    """A new version's new field would be refused without a reason, or be taken for one that we know."""
    found = subprocess.run(
        [str(serve_python()), "-c", "import importlib.util as i; print(i.find_spec('vllm').origin)"],
        capture_output=True,
        text=True,
        check=True,
    )
    folder = Path(found.stdout.strip()).parent / "entrypoints" / "openai"
    ours = {"ChatCompletionRequest": parameters.Chat, "CompletionRequest": parameters.Text}
    for place in ("chat_completion", "completion"):
        for node in ast.parse((folder / place / "protocol.py").read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name in ours:
                fields = {
                    line.target.id
                    for line in node.body
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
                    if not line.target.id.startswith("_")
                }
                known = {*ours.pop(node.name).model_fields, *parameters.DROPPED, *parameters.REFUSED}
                assert len(fields) > 40 and fields <= known
    assert not ours


def test_a_stream_whose_engine_dies_is_broken_and_others_may_come_again(server: Server) -> None:
    """vLLM ends it with [DONE], and answers 500 to who waits. The last test: the engine is gone."""
    processes = psutil.Process(server.pid).children(recursive=True)
    engine = next(process for process in processes if process.name() == "VLLM::EngineCore")
    for _ in range(20):
        streamed, waiting = _asked(server.url, stream=True), _asked(server.url, stream=False)
        answer = streamed.getresponse()
        first = answer.readline()
        engine.suspend()
        time.sleep(1)  # what it has said until now is here
        if b"[DONE]" not in _there(streamed) and not _there(waiting):
            break
        engine.resume()  # it was quicker
    engine.kill()
    with pytest.raises(http.client.IncompleteRead) as broken:
        answer.read()
    assert first.startswith(b"data: {") and b'"error"' in broken.value.partial and b"[DONE]" not in broken.value.partial
    waited = waiting.getresponse()
    assert waited.status == 503 and waited.headers["Retry-After"]
    assert "again" in json.load(waited)["error"]["message"]


def _asked(url: str, *, stream: bool) -> http.client.HTTPConnection:
    """A connection with the request for a long answer on its way."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    asked = {"model": NAME, "messages": _hi(), "max_tokens": 480, "ignore_eos": True, "stream": stream}
    connection.request("POST", CHAT, json.dumps(asked), {"Content-Type": "application/json"})
    return connection


def _there(connection: http.client.HTTPConnection) -> bytes:
    """What has come and was not read."""
    ready, _, _ = select.select([connection.sock], [], [], 0)
    return connection.sock.recv(1 << 22, socket.MSG_PEEK) if ready else b""
