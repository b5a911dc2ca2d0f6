"""The child process behind `batch`: vLLM inside this process, what is found written chunk by chunk."""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvila.components.contracts import jsonlines
from nvila.components.contracts.children import die_with_parent
from nvila.components.contracts.errors import DataError
from nvila.components.contracts.manifest import write_atomic
from nvila.components.contracts.progress import Progress
from nvila.components.data.media import Limits
from nvila.components.model.checkpoint.describe import image_tokens, video_tokens
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.decode.generation import answer_text
from nvila.components.model.decode.room import leaves_room
from nvila.components.model.text.conversation import IGNORED, VIDEO_TOKEN, Encoded, Turn, encode
from nvila.components.model.text.prompt import make_prompt, picture_marker
from nvila.components.model.text.timetokens import Times, times_of
from nvila.components.model.text.tokenizer import TokenIds, load_tokenizer
from nvila.components.model.vision.media import load_medium
from nvila.components.serve.batch import Score, answer_line, read_answers, served_config

PLUGIN = "nvila.components.serve.plugin:register"
"""What vLLM calls by our entry point; named here, so that it is part of the content key."""
CHUNK = 256
"""Requests between two writes of answers: large enough to keep the batch full."""


def main(arguments: list[str]) -> None:
    """`batch IN.jsonl OUT.jsonl --model DIR --what '{"max_new_tokens": N}'`, or `{"score": true}`."""
    parser = argparse.ArgumentParser(prog="nvila.components.serve.batch")
    parser.add_argument("requests", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--what", type=json.loads, required=True)
    parser.add_argument("--parent", type=int, help="process id: end when it ends, even by SIGKILL")
    args = parser.parse_args(arguments)
    if args.parent:
        die_with_parent(args.parent, signal.SIGKILL)

    requests = jsonlines.parse(args.requests.read_text(encoding="utf-8"))
    done = read_answers(args.answers)
    # Without what an interrupted attempt left torn, so that appending goes on at a line's start.
    write_atomic(args.answers, "".join(answer_line(args.answers, index, answer) for index, answer in done.items()))
    left = [request for request in requests if request["index"] not in done]
    progress = Progress("vLLM scores" if args.what.get("score") else "vLLM answers", len(requests))
    progress.update(len(done), "starting vLLM")
    began = time.monotonic()
    engine = start_engine(args.model)
    print(f"vLLM started in {time.monotonic() - began:.1f} s", flush=True)
    asking = Scores(args.model) if args.what.get("score") else Answers(args.model, args.what["max_new_tokens"])
    ask_all(engine, asking, left, args.answers, progress)


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


def ask_all(
    engine: Any, asking: Answers | Scores, requests: list[dict[str, Any]], answers: Path, progress: Progress
) -> None:
    """Append a line for each request to `answers`."""
    with answers.open("a", encoding="utf-8") as sink:
        for chunk in _chunks(requests, CHUNK):
            prompts = {request["index"]: asking.prompt(request) for request in chunk}
            fitting = {index: prompt for index, prompt in prompts.items() if prompt is not None}
            outputs = engine.generate([p.inputs for p in fitting.values()], asking.sampling, use_tqdm=False)
            found: dict[int, Any] = dict.fromkeys(prompts)
            for (index, prompt), output in zip(fitting.items(), outputs, strict=True):
                found[index] = asking.read(prompt, output)
            sink.write("".join(answer_line(answers, index, answer) for index, answer in found.items()))
            sink.flush()
            progress.update(len(chunk))


@dataclass(frozen=True)
class Asked:
    """What vLLM is given: token ids from our own template and decoded media, exactly as the torch model."""

    encoded: Encoded
    """Each medium is one marker here; the plugin expands it."""
    media: dict[str, list[Any]]
    options: dict[str, Any]
    """Of the plugin's processor."""
    times: Times | None = None
    """What times are in the clip."""

    @property
    def inputs(self) -> dict[str, Any]:
        """In vLLM's form."""
        inputs: dict[str, Any] = {"prompt_token_ids": self.encoded.input_ids}
        if any(self.media.values()):
            inputs |= {"multi_modal_data": self.media, "mm_processor_kwargs": self.options}
        return inputs


class _Asking:
    def __init__(self, model: Path) -> None:
        self.tokenizer = load_tokenizer(model)
        self.config = served_config(model)
        self.tokens = TokenIds.of(self.tokenizer, self.config.video_texts)

    def _asked(self, request: dict[str, Any], turns: list[Turn], *, score: bool) -> Asked | None:
        """None where the conversation leaves the decoder no position."""
        asked = _prompt(self.tokenizer, request, turns, self.config, score=score)
        (media,) = asked.media.values()
        longest = video_tokens(self.config) if request["kind"] == "video" else image_tokens(self.config)[1]
        if len(asked.encoded.input_ids) + longest * len(media) < self.config.positions:
            return asked
        # Media are cut only where the longest could be too long.
        prompt = make_prompt(turns, media, self.config, tile_all=score, pixels=True)
        return asked if leaves_room(prompt, self.tokenizer, self.config, self.tokens, generate=not score) else None


class Answers(_Asking):
    """Greedy answers to questions."""

    def __init__(self, model: Path, max_new_tokens: int) -> None:
        from vllm import SamplingParams

        super().__init__(model)
        # Decoded by the tokenizer that the torch model uses: vLLM's own detokenizer withholds unfinished characters.
        self.sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens, detokenize=False)

    def prompt(self, request: dict[str, Any]) -> Asked | None:
        """The question; None where it is too long for the torch model too."""
        return self._asked(request, [Turn("human", request["question"])], score=False)

    def read(self, asked: Asked, output: Any) -> str:
        """The answer's text."""
        text = answer_text(self.tokenizer, list(output.outputs[0].token_ids))
        return asked.times.said(text) if asked.times else text


class Scores(_Asking):
    """Losses of the answers in whole conversations, and the number of their tokens."""

    def __init__(self, model: Path) -> None:
        from vllm import SamplingParams

        super().__init__(model)
        self.sampling = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )

    def prompt(self, request: dict[str, Any]) -> Asked | None:
        """The conversation; None where it cannot be scored."""
        turns = [Turn(role, text) for role, text in request["turns"]]
        try:
            asked = self._asked(request, turns, score=True)
            why = None if asked else f"it leaves none of the decoder's {self.config.positions} positions"
        except DataError as error:
            asked, why = None, str(error)
        if why:
            print(f"request {request['index']} {request['media']}: {why}", flush=True)
        return asked

    def read(self, asked: Asked, output: Any) -> Score | None:
        """Summed over the supervised tokens within `max_length_tokens`; None where there are none, or no number."""
        known = _text(asked.encoded.input_ids, {self.tokens.image, self.tokens.video}, self.tokens.newline)
        places = _text(output.prompt_token_ids, {self.tokens.pad}, self.tokens.newline)
        losses, right = [], True
        for at, place in zip(known, places, strict=True):
            label = asked.encoded.labels[at]
            if label != IGNORED and place < self.config.max_length_tokens:
                found = output.prompt_logprobs[place][label]
                losses.append(-found.logprob)
                right &= found.rank == 1
        total = math.fsum(losses)
        if losses and math.isfinite(total):
            return Score(total, len(losses), right)
        print(f"{asked.media}: {len(losses)} supervised tokens within the length, loss {total}", flush=True)
        return None


def _text(ids: Sequence[int], media: set[int], newline: int) -> list[int]:
    """Places of the tokens that neither stand for media nor break the line behind one.

    The same tokens in the same order before and after the plugin has put as many placeholders as a medium needs, with
    line breaks between its tiles.
    """
    return [
        place
        for place, token in enumerate(ids)
        if token not in media and not (token == newline and place and ids[place - 1] in media)
    ]


def _prompt(tokenizer: Any, request: dict[str, Any], turns: list[Turn], config: ModelConfig, *, score: bool) -> Asked:
    """The question as the torch model is given it, or with `score` the conversation as it is trained on."""
    kind, paths = request["kind"], [Path(path) for path in request["media"]]
    marker = VIDEO_TOKEN if kind == "video" else picture_marker(config, alone=score or len(paths) == 1)
    limits = Limits(**request["limits"])
    media = [load_medium(path, kind, config, limits) for path in paths]
    times = times_of(config.time_tokens, [getattr(clip, "seconds", None) for clip in media])
    told = times.in_turns(turns) if times else turns
    encoded = encode(tokenizer, told, generate=not score, markers=[marker] * len(paths))
    return Asked(encoded, {kind: media}, {"tile_all": True, "blank": request["blank"]} if score else {}, times)


def _chunks(items: list[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
