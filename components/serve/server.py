"""Starts, probes, asks and stops one OpenAI-compatible vLLM server on this machine; rollout decides when."""

from __future__ import annotations

import base64
import contextlib
import json
import mimetypes
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nvila.components.contracts.addresses import http_url
from nvila.components.contracts.children import leashed
from nvila.components.contracts.environment import name_of, named
from nvila.components.contracts.errors import PreflightError, RolloutError
from nvila.components.contracts.foreign import read_object, reading
from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.data.sampling import Sampling
from nvila.components.model.text.controls import mend
from nvila.components.model.text.conversation import File, Part, Place
from nvila.components.serve import adapters
from nvila.components.serve.interpreter import serve_python, serve_variables
from nvila.components.serve.ports import why_not
from nvila.components.serve.told import Told

ENGINE_OPTIONS = (
    *("--enforce-eager", "--max-num-seqs", "32", "--skip-mm-profiling", "--disable-uvicorn-access-log"),
    *("--generation-config", "vllm"),
    *("--structured-outputs-config", '{"backend": "guidance"}'),
)
"""Small and quick to start; compiling pays only for larger models than a CPU serves.

What a request does not say has vLLM's neutral value, not that of the folder's `generation_config.json`: a penalty of
repetitions would give other answers than those that were evaluated. The tokens that end an answer are still read there.
Schemas are kept by the library that `infer` has: the middleware judges them by its rules.
"""

KEEP_SECONDS = 75
"""How long a connection without requests stays open: longer than who stands in front keeps it, so that no request of
theirs meets its end."""

_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The server is on this machine, whatever its address is called: no proxy that is set for all else leads there."""

_MOST_BYTES = 16 * 2**20
"""Of an answer: ten times what the longest one takes with its log probabilities."""

NO_LOGPROB = -9999.0
"""What vLLM says in place of a logarithm of nothing; `nan` compares as smaller than nothing."""


class Answer(NamedTuple):
    """Of a model."""

    text: str
    finite: bool
    """Whether each of its tokens has a probability: logits that are infinite or not numbers give none."""


@dataclass(frozen=True)
class Server:
    """A server that was started; it may still be loading."""

    pid: int
    """Of the process that ends the server and all that it has started when it ends itself; also its group's."""
    url: str
    """Base URL without `/v1`."""


def start(
    model_dir: Path,
    *,
    host: str = "127.0.0.1",
    port: int,
    served_name: str,
    log_path: Path,
    api_key: str | None = None,
    settings: EndpointSettings | None = None,
    threads: int = 1,
    heirs: Path | None = None,
) -> Server:
    """Start a server. It ends with this process, even where that is killed, unless it has `heirs`.

    Args:
        model_dir: serving folder.
        host: address to listen on.
        port: port to listen on.
        served_name: the `model` of requests.
        log_path: where stdout and stderr go.
        api_key: required as a bearer token of every request but the probes when given.
        settings: limits and permissions of requests.
        threads: compute threads, see `serve_variables`.
        heirs: a record of the processes that it goes on with, as of `leashed`.

    Raises:
        PreflightError: nothing can listen there, or there is no serving environment.
        ConfigError: an adapter that vLLM does not serve.
        DataError: the folder's configuration or an adapter is damaged, or the adapter is one of another model.
    """
    require_address(host, port)
    command = [str(serve_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model_dir)]
    # With `=`: the name of a folder may begin with a dash.
    command += [f"--served-model-name={served_name}", "--host", host, "--port", str(port), *ENGINE_OPTIONS]
    with reading(place := model_dir / "config.json"):
        model = read_object(place)
        sampling = Sampling(model["nvila"]["num_video_frames"], model["nvila"].get("fps", 0.0))
    command += ["--media-io-kwargs", json.dumps({"video": sampling.to_options()})]
    told = Told(model_dir=model_dir.absolute(), settings=settings or EndpointSettings())
    command += adapters.options(told.settings.adapters, served_name, model)
    command += ["--middleware", "nvila.components.serve.guard.Guard"]
    command += ["--mm-processor-cache-gb", "0"]  # `processing.Kept` stands for it
    variables = serve_variables(threads) | told.variables() | {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_SECONDS)}
    variables.pop(name_of("vllm_key"), None)
    if api_key is not None:
        variables |= named(vllm_key=api_key)  # not on the command line, which every user of the machine can read
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as sink:
        child = leashed(command, heirs=heirs or "", env=variables, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)
    return Server(child.pid, http_url(host, port))


def require_address(host: str, port: int) -> None:
    """Raises:
    PreflightError: no server can listen there: the port is taken, say, or the address is none of this machine.
    """
    if reason := why_not(host, port):
        raise PreflightError(
            f"nothing of ours can listen there ({reason})",
            where=f"{host}:{port}",
            do="Choose another address: rollout.host and rollout.port, or --host and --port of `nvila serve`.",
        )


def wait_ready(url: str, deadline_seconds: float, pid: int, log_path: Path | None = None) -> float:
    """Wait until `/health` answers; returns the seconds it took.

    Raises:
        RolloutError: the process ended, or the deadline passed.
    """
    began = time.monotonic()
    while (waited := time.monotonic() - began) < deadline_seconds:
        if not is_alive(pid):
            raise RolloutError("the server ended while starting: " + _tail(log_path), where=str(log_path or url))
        if is_ready(url):
            return waited
        time.sleep(0.5)
    raise RolloutError(
        f"the server was not ready within {deadline_seconds:.0f} seconds: " + _tail(log_path),
        where=str(log_path or url),
        do="Look into its log; a slower machine needs a larger rollout.policy.deadline_seconds.",
    )


def is_ready(url: str) -> bool:
    """Whether `/health` says yes."""
    return get(f"{url}/health") is not None


def get(url: str, timeout_seconds: float = 5.0) -> str | None:
    """The text at a path of a server of this machine; None where it gives none."""
    try:
        with _DIRECTLY.open(url, timeout=timeout_seconds) as answer:
            return answer.read().decode(errors="replace") if answer.status == 200 else None
    except (OSError, HTTPException):
        return None


def is_alive(pid: int) -> bool:
    """Whether the process is there and not a zombie of ours."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def stop(pid: int, grace_seconds: float = 20.0) -> None:
    """End the server's process group: SIGTERM, then SIGKILL after `grace_seconds`. Nothing happens when it is gone."""
    for sign, patience in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, sign)
        deadline = time.monotonic() + patience
        while _group_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        if not _group_alive(pid):
            return


def _group_alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def ask(
    url: str,
    model: str,
    question: str | Sequence[Part[File]],
    *,
    image: Path | None = None,
    video: Path | None = None,
    max_tokens: int = 32,
    api_key: str | None = None,
    timeout_seconds: float = 120.0,
) -> Answer:
    """The answer to one question about pictures, clips, or nothing; arguments as of `chat_request`.

    Control strings that the answer speaks of are whole again.

    Raises:
        RolloutError: the server refused or did not answer.
    """
    body = chat_request(model, question, image=image, video=video, max_tokens=max_tokens) | {"logprobs": True}
    return send(url, json.dumps(body).encode(), api_key=api_key, timeout_seconds=timeout_seconds)


def send(
    url: str,
    body: bytes,
    *,
    api_key: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_seconds: float = 120.0,
) -> Answer:
    """The answer to a request as of `chat_request` that asks for `logprobs`.

    Raises:
        RolloutError: the server refused, did not answer, or said too much.
    """
    key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data=body, headers={"Content-Type": "application/json", **key, **(headers or {})}
    )
    try:
        with _DIRECTLY.open(request, timeout=timeout_seconds) as answer:
            choice = json.loads(answer.read(_MOST_BYTES))["choices"][0]
            told = ((choice.get("logprobs") or {}).get("content")) or []
            finite = all(isinstance(token["logprob"], float | int) and token["logprob"] > NO_LOGPROB for token in told)
            return Answer(mend(str(choice["message"]["content"] or "").strip()), finite)
    except urllib.error.HTTPError as error:
        detail = error.read(500).decode(errors="replace")
        raise RolloutError(f"the server answered {error.code}: {detail}", where=url) from None
    except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RolloutError(f"the server did not answer: {error}", where=url) from None


def chat_request(
    model: str,
    question: str | Sequence[Part[File]],
    *,
    image: Path | None = None,
    video: Path | None = None,
    max_tokens: int = 32,
) -> dict[str, Any]:
    """Body of a `/v1/chat/completions` request: media as data URLs, greedy.

    Args:
        model: its served name.
        question: texts and files in their order (`conversation.messages_of`), or one text. Texts stay text.
        image: a picture in front of the question.
        video: a clip in front of the question.
        max_tokens: longest answer.

    Raises:
        DataError: a file cannot be read.
    """
    parts: list[Part[File]] = [question] if isinstance(question, str) else list(question)
    given: list[tuple[Literal["image", "video"], Path | None]] = [("image", image), ("video", video)]
    content: list[dict[str, Any]] = []
    for part in [*(Place((kind, path)) for kind, path in given if path is not None), *parts]:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            kind, path = part.medium
            content.append({"type": f"{kind}_url", f"{kind}_url": {"url": _data_url(path)}})
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }


def _data_url(path: Path) -> str:
    kind = mimetypes.guess_type(f"file{path.suffix}")[0] or "application/octet-stream"
    with reading(path):
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _tail(log_path: Path | None, count: int = 8) -> str:
    if log_path is None or not log_path.is_file():
        return "no log"
    with log_path.open(errors="replace") as file:
        return "".join(deque(file, maxlen=count)).strip()
