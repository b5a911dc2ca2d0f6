"""Answers questions, or scores conversations, with vLLM in one go: in a child process of the serving environment.

The caller (main environment) writes requests as JSON lines and reads answers as JSON lines; an answer is kept as soon
as its chunk is done, so that killed work goes on where it was. `batch_process` is what runs inside the child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from nvila.components.contracts import jsonlines
from nvila.components.contracts.children import how_ended
from nvila.components.contracts.digests import sha256_of
from nvila.components.contracts.errors import RolloutError
from nvila.components.contracts.files import digest_json, write_atomic
from nvila.components.contracts.foreign import read_object, reading
from nvila.components.contracts.text import say
from nvila.components.data.media import Limits
from nvila.components.serve.interpreter import serve_python, serve_variables

if TYPE_CHECKING:
    from nvila.components.data.samples import Sample
    from nvila.components.model.config.config import ModelConfig


@dataclass(frozen=True)
class Request:
    """One question about pictures or a clip."""

    media: Sequence[str]
    """Paths of the media files."""
    kind: Literal["image", "video"]
    question: str
    """A human turn in the form of a record: media stand where it has literals, the first of too many in front."""
    limits: Limits = field(default_factory=Limits)
    """What the media may be."""


@dataclass(frozen=True)
class Conversation:
    """A whole conversation about pictures or a clip, whose answers are scored."""

    media: Sequence[str]
    """Paths of the media files."""
    kind: Literal["image", "video"]
    turns: Sequence[tuple[str, str]]
    """Role and text of each turn, as in a record."""
    limits: Limits = field(default_factory=Limits)
    """What the media may be."""
    blank: bool = False
    """Whether the model is shown grey instead (`preprocess.blank`)."""

    @classmethod
    def of(cls, sample: Sample, *, blank: bool = False) -> Conversation:
        """A sample's.

        Raises:
            MediaError: as of `Sample.paths`.
        """
        turns = [(turn.role, turn.text) for turn in sample.conversations]
        return cls([str(path) for path in sample.paths], sample.kind, turns, sample.limits, blank)


class Score(NamedTuple):
    """What a model makes of a conversation's answers."""

    nats: float
    """Their loss, summed over the tokens."""
    tokens: int
    """End tokens included."""
    right: bool
    """Whether each token was the likeliest: what greedy decoding would have said."""


def generate_with_vllm(
    model_dir: Path, requests: Sequence[Request], *, max_new_tokens: int, work: Path, threads: int = 1
) -> list[str]:
    """Greedy answers, in the order of `requests`; a question that is too long for the model (`room.leaves_room`)
    has an empty one.

    Args:
        model_dir: serving folder (`model.checkpoint.serving`).
        requests: the questions.
        max_new_tokens: longest answer.
        work: folder for requests, answers and log; answers found there for the same model and requests are kept.
        threads: compute threads, see `serve_variables`.

    Raises:
        PreflightError: no serving environment.
        RolloutError: the child died; its last lines are in the message, its log in `work`.
    """
    answers = _told(model_dir, requests, {"max_new_tokens": max_new_tokens}, work, threads)
    unanswered = sum(text is None for text in answers)
    if unanswered:
        from nvila.components.model.decode.room import say_unanswered

        say_unanswered("vLLM", unanswered, len(requests), served_config(model_dir))
    return [text or "" for text in answers]


def score_with_vllm(
    model_dir: Path, requests: Sequence[Conversation], *, work: Path, threads: int = 1
) -> list[Score | None]:
    """Loss of each conversation's answers, in the order of `requests`.

    What counts is what training supervises: every answer and its end, as far as `max_length_tokens` reaches, each
    picture of several tiled. A conversation has None where it leaves the decoder no position, where nothing supervised
    lies within `max_length_tokens`, where a medium cannot be read or where the loss is not finite; the log says which.

    Arguments and errors as of `generate_with_vllm`. One call starts vLLM once, which takes most of a minute.
    """
    found = _told(model_dir, requests, {"score": True}, work, threads)
    if unscored := found.count(None):
        say(f"vLLM: {unscored} of {len(requests)} conversations have no score; the log in {work} says why")
    return [None if one is None else Score(*one) for one in found]


def _told(
    model_dir: Path, requests: Sequence[Request | Conversation], what: dict[str, Any], work: Path, threads: int
) -> list[Any]:
    """What the child finds for each request, in their order; `what` is asked of each."""
    if not requests:
        return []
    python = serve_python()
    work.mkdir(parents=True, exist_ok=True)
    wanted = [asdict(request) for request in requests]
    key = digest_json({"model": _identity(model_dir), "requests": wanted, **what})[:16]
    asked, answered, log = (work / f"vllm-{key}.{end}" for end in ("requests.jsonl", "answers.jsonl", "log"))
    answers = read_answers(answered)
    if len(answers) < len(requests):
        write_atomic(asked, "".join(json.dumps({"index": i, **r}) + "\n" for i, r in enumerate(wanted)))
        command = [str(python), "-m", "nvila.components.serve.batch", str(asked), str(answered)]
        command += ["--model", str(model_dir), "--what", json.dumps(what), "--parent", str(os.getpid())]
        variables = serve_variables(threads)
        variables["VLLM_LOGGING_LEVEL"] = "ERROR"  # in one process vLLM warns at every request
        # A second process costs another import of everything (20 s on two cores) and buys nothing with one worker.
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        with log.open("w") as sink:
            done = subprocess.run(command, env=variables, stdout=sink, stderr=subprocess.STDOUT, check=False)
        answers = read_answers(answered)
        if done.returncode or len(answers) < len(requests):
            raise RolloutError(
                f"vLLM answered {len(answers)} of {len(requests)} requests and {how_ended(done.returncode)}: "
                + _last_lines(log),
                where=str(log),
                do="Run again: the answers so far are kept.",
            )
    return [answers[index] for index in range(len(requests))]


def _identity(model_dir: Path) -> dict[str, str]:
    """Names and digests of the model's files."""
    return {path.name: sha256 for path, sha256 in sha256_of(sorted(filter(Path.is_file, model_dir.iterdir()))).items()}


def answer_line(path: Path, index: int, answer: Any) -> str:
    """A line of the answers file at `path`, sealed: an answer, or None for a request that has none."""
    said = {"index": index, "answer": answer}
    return json.dumps(said | {"sha256": digest_json([path.name, said])}) + "\n"


def read_answers(path: Path) -> dict[int, Any]:
    """Answers so far, by the index of their request; lines that are torn, damaged or of another file are none."""
    answers: dict[int, Any] = {}
    for record in jsonlines.whole(path):
        index, answer = record.get("index"), record.get("answer")
        if isinstance(index, int) and json.loads(answer_line(path, index, answer)) == record:
            answers[index] = answer
    return answers


def served_config(model_dir: Path) -> ModelConfig:
    """The architecture of a serving folder.

    Raises:
        ConfigError, DataError: its configuration is damaged, or none that this model computes.
    """
    from nvila.components.model.config.config import ModelConfig

    with reading(place := model_dir / "config.json"):
        return ModelConfig.from_json(read_object(place)["nvila"], where=str(place))


def _last_lines(log: Path, count: int = 12) -> str:
    with log.open(errors="replace") as file:
        return "".join(deque(file, maxlen=count)).strip()


if __name__ == "__main__":
    from nvila.components.serve.batch_process import main

    main(sys.argv[1:])
