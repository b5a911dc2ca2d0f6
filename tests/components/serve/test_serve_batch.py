from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import PreflightError, RolloutError
from nvila.components.serve.batch import (
    Conversation,
    Request,
    answer_line,
    generate_with_vllm,
    read_answers,
    score_with_vllm,
)
from nvila.components.serve.interpreter import serve_python

REQUESTS = [Request([f"/data/{i}.png"], "image", f"question {i}") for i in range(5)]
FAKE = """#!/bin/sh
# Stands for the serving Python: answers as many requests as told, in the form of the real worker.
exec {python} - "$3" "$4" <<'END'
import hashlib, json, pathlib, sys
asked = [json.loads(line) for line in open(sys.argv[1])]
try:
    done = {{json.loads(line)["index"] for line in open(sys.argv[2])}}
except FileNotFoundError:
    done = set()
left = [r for r in asked if r["index"] not in done][:{count}]
with open(sys.argv[2], "a") as out:
    for r in left:
        answer = r["question"].upper() if "question" in r else [0.1 * r["index"], 3, True] if r["turns"] else None
        said = {{"index": r["index"], "answer": answer}}
        sealed = json.dumps([pathlib.Path(sys.argv[2]).name, said], sort_keys=True, separators=(",", ":"))
        out.write(json.dumps(said | {{"sha256": hashlib.sha256(sealed.encode()).hexdigest()}}) + "\\n")
print("last words")
sys.exit({code})
END
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, code: int) -> None:
    import sys

    script = tmp_path / f"python-{count}-{code}"
    script.write_text(FAKE.format(python=sys.executable, count=count, code=code))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("NVILA_SERVE_PYTHON", str(script))


def test_missing_environment_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A traceback of a missing interpreter after an hour of training helps nobody."""
    monkeypatch.setenv("NVILA_SERVE_PYTHON", str(tmp_path / "no" / "python"))
    with pytest.raises(PreflightError, match="the serving environment with vLLM is missing"):
        serve_python()


def test_answers_come_in_the_order_of_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    """Accuracy is computed by position."""
    _fake(tmp_path, monkeypatch, 99, 0)
    answers = generate_with_vllm(model, REQUESTS, max_new_tokens=4, work=tmp_path / "work")
    assert answers == [f"QUESTION {i}" for i in range(5)]


def test_killed_evaluation_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    """Answers so far are kept, a line cut off by the kill is not believed, and the child is told what is left."""
    work = tmp_path / "work"
    _fake(tmp_path, monkeypatch, 2, 137)
    with pytest.raises(RolloutError, match=r"answered 2 of 5 requests and ended with code 137: last words"):
        generate_with_vllm(model, REQUESTS, max_new_tokens=4, work=work)
    _fake(tmp_path, monkeypatch, 99, 0)
    assert generate_with_vllm(model, REQUESTS, max_new_tokens=4, work=work) == [f"QUESTION {i}" for i in range(5)]
    assert len(next(work.glob("*.answers.jsonl")).read_text().splitlines()) == 5


def test_killed_scoring_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores of a shard that cost hours are kept to the last digit, those of the same media shown blank are others, and
    who has none is counted aloud."""
    turns = [("human", "question"), ("gpt", "answer")]
    asked = [Conversation([f"/data/{i}.png"], "image", turns if i < 4 else []) for i in range(5)]
    _fake(tmp_path, monkeypatch, 2, 137)
    with pytest.raises(RolloutError, match="answered 2 of 5"):
        score_with_vllm(model, asked, work=tmp_path / "work")
    _fake(tmp_path, monkeypatch, 99, 0)
    expected = [(0.1 * i, 3, True) for i in range(4)]
    assert score_with_vllm(model, asked, work=tmp_path / "work") == [*expected, None]
    assert "1 of 5 conversations have no score" in capsys.readouterr().err
    _fake(tmp_path, monkeypatch, 0, 1)
    assert score_with_vllm(model, asked, work=tmp_path / "work") == [*expected, None]
    with pytest.raises(RolloutError, match="answered 0 of 5"):
        score_with_vllm(model, [replace(one, blank=True) for one in asked], work=tmp_path / "work")


SAID: list[Any] = ["a\u2028b\x85c\x0bd", "4", None, "", "é"]
"""Texts with signs that end lines elsewhere, and a question that is too long."""


def _flip(content: bytes) -> bytes:
    return content.replace(b'"4"', b'"5"')


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda content: content, {0, 1, 2, 3, 4}),
        (lambda content: content[:-9], {0, 1, 2, 3}),
        (lambda content: content[:-1], {0, 1, 2, 3, 4}),
        (_flip, {0, 2, 3, 4}),
        (lambda content: content.replace(b'"index": 1', b'"index": 9'), {0, 2, 3, 4}),
        (lambda content: content.replace(b"null", b'"xy"'), {0, 1, 3, 4}),
        (lambda content: content[:20] + bytes(60) + content[80:], {1, 2, 3, 4}),
        (lambda content: bytes(len(content)), set()),
        (lambda content: b"[]\n7\nnull\n{}\n\xff\xfe\n" + content, {0, 1, 2, 3, 4}),
    ],
)
def test_damaged_answers_are_not_believed(damage: Callable[[bytes], bytes], left: set[int], tmp_path: Path) -> None:
    """An answer that a torn write or a flipped byte made would be counted, and pinned, as the model's."""
    path = tmp_path / "vllm-1.answers.jsonl"
    whole = "".join(answer_line(path, index, text) for index, text in enumerate(SAID)).encode()
    path.write_bytes(damage(whole))
    assert read_answers(path) == {index: text for index, text in enumerate(SAID) if index in left}
    path.rename(tmp_path / "vllm-2.answers.jsonl")
    assert read_answers(tmp_path / "vllm-2.answers.jsonl") == read_answers(path) == {}


def test_answers_of_another_model_are_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    """A resumed folder may hold answers of a model that was quantized again since."""
    work = tmp_path / "work"
    _fake(tmp_path, monkeypatch, 99, 0)
    generate_with_vllm(model, REQUESTS, max_new_tokens=4, work=work)
    (model / "config.json").write_text('{"other": 1}')
    _fake(tmp_path, monkeypatch, 0, 1)
    with pytest.raises(RolloutError, match="answered 0 of 5"):
        generate_with_vllm(model, REQUESTS, max_new_tokens=4, work=work)


def test_complete_answers_start_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    """A step that failed after generating must not pay for vLLM again."""
    work = tmp_path / "work"
    _fake(tmp_path, monkeypatch, 99, 0)
    first = generate_with_vllm(model, REQUESTS, max_new_tokens=4, work=work)
    _fake(tmp_path, monkeypatch, 0, 1)
    assert generate_with_vllm(model, REQUESTS, max_new_tokens=4, work=work) == first
    lines = next(work.glob("*.requests.jsonl")).read_text().splitlines()
    assert json.loads(lines[0])["question"] == "question 0"
