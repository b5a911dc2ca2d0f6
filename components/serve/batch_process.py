"""The child process behind `batch`: vLLM inside this process, greedy decoding, answers written chunk by chunk."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvila.components.contracts.manifest import write_atomic
from nvila.components.contracts.progress import Progress
from nvila.components.data.media import Limits
from nvila.components.model.checkpoint.describe import image_tokens, video_tokens
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.decode.generation import answer_text
from nvila.components.model.decode.room import leaves_room
from nvila.components.model.text.conversation import VIDEO_TOKEN, Turn, encode
from nvila.components.model.text.prompt import make_prompt, picture_marker
from nvila.components.model.text.tokenizer import TokenIds, load_tokenizer
from nvila.components.model.vision.media import load_medium
from nvila.components.serve.batch import answer_line, read_answers, served_config

PLUGIN = "nvila.components.serve.plugin:register"
"""What vLLM calls by our entry point; named here, so that it is part of the content key."""
CHUNK = 256
"""Requests between two writes of answers: large enough to keep the batch full."""


def main(arguments: list[str]) -> None:
    """`batch IN.jsonl OUT.jsonl --model DIR --max-new-tokens N`."""
    parser = argparse.ArgumentParser(prog="nvila.components.serve.batch")
    parser.add_argument("requests", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--max-new-tokens", type=int, required=True)
    args = parser.parse_args(arguments)

    requests = [json.loads(line) for line in args.requests.read_text(encoding="utf-8").splitlines()]
    done = read_answers(args.answers)
    # Without what an interrupted attempt left torn, so that appending goes on at a line's start.
    write_atomic(args.answers, "".join(answer_line(args.answers, index, text) for index, text in done.items()))
    left = [request for request in requests if request["index"] not in done]
    progress = Progress("vLLM answers", len(requests))
    progress.update(len(done), "starting vLLM")
    began = time.monotonic()
    engine = start_engine(args.model)
    print(f"vLLM started in {time.monotonic() - began:.1f} s", flush=True)
    answer_all(engine, args.model, left, args.answers, args.max_new_tokens, progress)


def start_engine(model: Path) -> Any:
    """A vLLM engine in this process, sized for short prompts on a few cores."""
    from vllm import LLM

    return LLM(
        model=str(model),
        dtype=json.loads((model / "config.json").read_text(encoding="utf-8"))["dtype"],  # "auto" narrows float32
        enforce_eager=True,  # compiling costs more than it saves below some ten thousand requests
        distributed_executor_backend="uni",
        max_num_seqs=128,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        skip_mm_profiling=True,
        disable_log_stats=True,
        seed=0,
    )


def answer_all(
    engine: Any, model: Path, requests: list[dict[str, Any]], answers: Path, max_new_tokens: int, progress: Progress
) -> None:
    """Append a line for each request to `answers`."""
    from vllm import SamplingParams

    tokenizer = load_tokenizer(model)
    config = served_config(model)
    tokens = TokenIds.of(tokenizer, config.video_texts)
    # Decoded by the tokenizer that the torch model uses: vLLM's own detokenizer withholds unfinished characters.
    sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, detokenize=False)
    with answers.open("a", encoding="utf-8") as sink:
        for chunk in _chunks(requests, CHUNK):
            found: dict[int, str | None] = {request["index"]: None for request in chunk}
            prompts = {request["index"]: _prompt(tokenizer, request, config) for request in chunk}
            fitting = [r["index"] for r in chunk if _fits(prompts[r["index"]], r, tokenizer, config, tokens)]
            outputs = engine.generate([prompts[index] for index in fitting], sampling, use_tqdm=False)
            for index, output in zip(fitting, outputs, strict=True):
                found[index] = answer_text(tokenizer, list(output.outputs[0].token_ids))
            sink.write("".join(answer_line(answers, index, text) for index, text in found.items()))
            sink.flush()
            progress.update(len(chunk))


def _prompt(tokenizer: Any, request: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Token ids from our own template and decoded media: exactly what the torch model is given.

    Each medium is one marker here; the plugin expands it.
    """
    kind, paths = request["kind"], [Path(path) for path in request["media"]]
    marker = VIDEO_TOKEN if kind == "video" else picture_marker(config, alone=len(paths) == 1)
    turns = [Turn("human", request["question"])]
    ids = encode(tokenizer, turns, generate=True, markers=[marker] * len(paths)).input_ids
    limits = Limits(**request["limits"])
    media = [load_medium(path, kind, config, limits) for path in paths]
    return {"prompt_token_ids": ids, "multi_modal_data": {kind: media}}


def _fits(prompt: dict[str, Any], request: dict[str, Any], tokenizer: Any, config: ModelConfig, ids: TokenIds) -> bool:
    """Whether the torch model would answer this too. Media are cut only where the longest could be too long."""
    (media,) = prompt["multi_modal_data"].values()
    longest = video_tokens(config) if request["kind"] == "video" else image_tokens(config)[1]
    if len(prompt["prompt_token_ids"]) + longest * len(media) < config.positions:
        return True
    asked = make_prompt([Turn("human", request["question"])], media, config, pixels=True)
    return leaves_room(asked, tokenizer, config, ids)


def _chunks(items: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
