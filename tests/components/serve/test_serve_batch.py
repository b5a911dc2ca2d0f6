from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from nvila.components.contracts.errors import PreflightError, RolloutError
from nvila.components.serve.batch import Request, generate_with_vllm, read_answers
from nvila.components.serve.environment import PYTHON_VARIABLE, serve_python

REQUESTS = [Request([f"/data/{i}.png"], "image", f"question {i}") for i in range(5)]
FAKE = """#!/bin/sh
# Stands for the serving Python: answers as many requests as told, in the form of the real worker.
exec {python} - "$3" "$4" <<'END'
import json, sys
sys.path = {path}
from pathlib import Path
from nvila.components.serve.batch import answer_line, read_answers
asked = [json.loads(line) for line in open(sys.argv[1])]
done = read_answers(Path(sys.argv[2]))
left = [r for r in asked if r["index"] not in done][:{count}]
with open(sys.argv[2], "a") as out:
    for r in left:
        out.write(answer_line(r["index"], r["question"].upper(), []))
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
    script.write_text(FAKE.format(python=sys.executable, path=sys.path, count=count, code=code))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(PYTHON_VARIABLE, str(script))


def test_missing_environment_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A traceback of a missing interpreter after an hour of training helps nobody."""
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "no" / "python"))
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
    kept = next(work.glob("*.answers.jsonl"))
    kept.write_text(kept.read_text() + '{"index": 2, "te')
    from nvila.components.serve.worker import _end_last_line

    _end_last_line(kept)  # as the real worker does first
    assert read_answers(kept).keys() == {0, 1}
    _fake(tmp_path, monkeypatch, 99, 0)
    assert generate_with_vllm(model, REQUESTS, max_new_tokens=4, work=work)[2:] == [f"QUESTION {i}" for i in (2, 3, 4)]
    assert read_answers(kept).keys() == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("damage", [(b"QUESTION 1", b"QUESTION 7"), (b'"index": 1', b'"index": 0'), (b"N 1", b"N \xff"),
                                    (b'{"index": 1', b'5\n["index", 1'), (b"{", b"\0")])  # fmt: skip
def test_a_damaged_answer_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, damage: tuple[bytes, bytes]
) -> None:
    """A flipped byte in the answers of an interrupted evaluation was counted, or ended every further run."""
    _fake(tmp_path, monkeypatch, 3, 137)
    with pytest.raises(RolloutError):
        generate_with_vllm(model, REQUESTS, max_new_tokens=4, work=tmp_path / "work")
    kept = next((tmp_path / "work").glob("*.answers.jsonl"))
    kept.write_bytes(kept.read_bytes().replace(*damage, 1))
    _fake(tmp_path, monkeypatch, 99, 0)
    answers = generate_with_vllm(model, REQUESTS, max_new_tokens=4, work=tmp_path / "work")
    assert answers == [f"QUESTION {i}" for i in range(5)]


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
