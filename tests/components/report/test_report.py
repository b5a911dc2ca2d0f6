from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from telling import retained, scored

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.results.accuracy import Evaluation, QuantizedEvaluation
from nvila.components.contracts.results.run import Ending
from nvila.components.contracts.steps import STEPS
from nvila.components.data.samples import QUARANTINE_FILE
from nvila.components.report.close_run import notice
from nvila.components.report.flow import duration, lanes
from nvila.components.report.page import accuracy_rows
from nvila.components.report.step import Settings, render, run
from nvila.components.runner.status import Run, Status, StepStatus
from nvila.pipelines.show.summary import write_summary

MakeRun = Callable[..., Path]
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}</style></title>"
SHOWN = tuple(row for row in STEPS if not row.at_exit)
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, the text; and whether they nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.events: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "xlink:href")]
        self.events += [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style",):
            self.text += data + " "


def page(run_dir: Path) -> Page:
    return Page(render(Run.read(run_dir)))


def test_finished_run_tells_everything(make_run: MakeRun) -> None:
    """The page is what people look at first: each part of the work must be on it."""
    seen = page(make_run())
    text = " ".join(seen.text.split())
    for part in (
        "nvila-tiny version 3 is serving", "http://127.0.0.1:8321", "18 min 59 s", "81.0%", "79.0% to 83.0%",
        "blank picture", "Stage 5", "1,200 of 1,600 samples stay, ranked by DeltaLoss", "Set aside: 3",
        "W8A8: 18 linear",
        "2.47 times smaller", "models:/nvila-tiny/3", "18 manifests", "quarantine",
    ):  # fmt: skip
        assert part in text, part
    assert [row.name for row in SHOWN if row.name not in text] == []
    assert "400 steps, loss" in text and text.count("MFU 25%, loader wait 5.0%, padding 25.0%") == 1
    assert seen.tags.count("figure") == 18 + 3 * 12
    assert seen.tags.count("svg") == 1 + 2 + 5 + 2 + 3 * 3


def test_a_refused_validation_shows_what_was_set_aside(make_run: MakeRun, tmp_path: Path) -> None:
    """The page had the message alone: with 300 spoilt records people looked for the file, and read it line by line."""
    run_dir, left = make_run(stop_at="validate", verdict="failed"), tmp_path / "left" / QUARANTINE_FILE
    left.parent.mkdir()
    lines = [
        {"id": f"shapes/sft/{i}", "source": "shapes", "line": i, "reason": why, "detail": f"{HOSTILE} {i}"}
        for i, why in enumerate(["missing_file", "bad_text", "missing_file", "missing_file"])
    ]
    left.write_text("\n".join(map(json.dumps, lines)))
    status = run_dir / "steps" / "validate.json"
    error = {"error": {"kind": "DataError", "details": {"quarantine": str(left)}}}
    status.write_text(json.dumps(json.loads(status.read_text()) | error))
    text = " ".join(page(run_dir).text.split())
    assert "Set aside: 4" in text and f"All of them are in {left}" in text
    assert f"shapes missing_file 3 shapes/sft/0 {HOSTILE} 0 shapes bad_text 1 shapes/sft/1 {HOSTILE} 1" in text
    told = write_summary(Run.read(run_dir), 1.0, 0, 2).quarantine
    assert [(one.reason, one.count, one.line) for one in told] == [("missing_file", 3, 0), ("bad_text", 1, 1)]
    left.unlink()
    assert "Set aside" not in page(run_dir).text


def test_page_needs_no_network_and_runs_nothing(make_run: MakeRun) -> None:
    """Offline means offline, and a report that is mailed around must not be able to call home."""
    html = render(Run.read(make_run()))
    seen = Page(html)
    assert "script" not in seen.tags and seen.events == []
    assert [link for link in seen.links if not link.startswith(("data:image/", "#"))] == []
    assert re.findall(r"url\(|@import", html) == []
    assert "default-src 'none'" in html


def test_hostile_records_stay_text(make_run: MakeRun) -> None:
    """Questions, answers, names and reasons come from users' files; none of it may become markup."""
    plain, hostile = page(make_run()), page(make_run(text=HOSTILE))
    assert hostile.tags == plain.tags
    assert hostile.events == [] and "script" not in hostile.tags
    assert HOSTILE in hostile.text


def test_rejected_run_says_so_with_the_gates_words(make_run: MakeRun) -> None:
    """After a rejection the report is how one learns why; it must not need the steps that never ran."""
    seen = page(make_run(stop_at="gate", text="digits: exact match 0.31 is below 0.4"))
    assert "Rejected by gate (exit code 3)" in seen.text
    assert "the gate says no: digits: exact match 0.31 is below 0.4" in seen.text
    assert "not reached" in seen.text
    assert "not measured" in seen.text


HEADLINE = re.compile(r'<div class="headline (\w+)">\s*<h1>(.*?)</h1>', re.DOTALL)


@pytest.mark.parametrize(
    ("accuracy", "quantized", "tone", "said"),
    [(0.72, 0.71, "good", "is serving"), (0.3, 0.3, "neutral", "but not above its baseline: digits"),
     (0.72, 0.22, "neutral", "but lost by quantization: digits"), (0.72, None, "neutral", "but not measured")],
)  # fmt: skip
def test_only_a_good_model_gets_a_green_headline(
    make_run: MakeRun, accuracy: float, quantized: float | None, tone: str, said: str
) -> None:
    """Gates may ask for nothing; the page must not call a model good that guesses or that quantization broke."""
    run = Run.read(make_run())
    full, small = run.result(Evaluation), run.result(QuantizedEvaluation)
    assert full and small
    full.accuracy["digits"] = scored(accuracy)
    del small.accuracy["digits"]
    if quantized is not None:
        small.accuracy["digits"] = retained(quantized, full=accuracy)
    found = HEADLINE.search(render(run))
    assert found and found[1] == tone and said in found[2]
    came_through = Ending(outcome="succeeded", exit_code=Exit.DONE)
    assert (said[4:] if tone == "neutral" else "learnt") in notice(make_run(), run, came_through)["headline"]


def test_the_change_is_that_of_the_same_questions(make_run: MakeRun) -> None:
    """With fewer questions for the quantized model, two accuracies differ for reasons other than quantization."""
    run = Run.read(make_run())
    small = run.result(QuantizedEvaluation)
    assert small
    small.accuracy["digits"] = retained(0.6, full=0.61)
    (row,) = [row for row in accuracy_rows(run) if row["source"] == "digits"]
    assert row["change"] == pytest.approx(-0.01)


def test_no_text_looks_like_another_or_gives_a_secret_away(make_run: MakeRun) -> None:
    """The report is mailed around; a name that turns the direction of writing reads like another one."""
    html = render(Run.read(make_run(text="abc\u202egnp.exe\x1b[31m token=hunter2hunter2 hf_" + "a1" * 17)))
    assert "\u202e" not in html and "\x1b" not in html and "\\u202e" in html
    assert "hunter2" not in html and "a1a1a1" not in html


@pytest.mark.parametrize("step", [row.name for row in SHOWN])
@pytest.mark.parametrize("verdict", ["failed", "preempted"])
def test_any_step_may_be_the_last(make_run: MakeRun, step: str, verdict: str) -> None:
    """The exit task runs after any failure, however early."""
    text = page(make_run(stop_at=step, verdict=verdict)).text
    assert f"{'Failed' if verdict == 'failed' else 'Interrupted'} in {step}" in text


def test_run_without_any_step(tmp_path: Path) -> None:
    """Even when resolve never wrote its status the exit task must leave a page."""
    assert "Not finished" in page(tmp_path).text


@pytest.mark.parametrize(
    ("last", "verdict", "said", "not_said"),
    [
        ("register", "done", ["Not finished", "ended before rollout began"], ["is registered", "is serving"]),
        ("train-2", "running", ["Killed in train-2", "killed"], ["running", "Not finished"]),
    ],
)
def test_a_run_that_was_ended_from_outside(
    make_run: MakeRun, last: str, verdict: str, said: list[str], not_said: list[str]
) -> None:
    """A page must not call a run finished, or a step running, that somebody has killed."""
    text = page(make_run(stop_at=last, verdict=verdict)).text
    assert [words for words in said if words not in text] == []
    assert [words for words in not_said if words in text] == []


def test_damaged_run_still_gets_a_page(make_run: MakeRun) -> None:
    """A manifest or status file that is broken is shown; the report does not break with it."""
    run_dir = make_run()
    status = json.loads((run_dir / "steps" / "quantize.json").read_text())
    Path(status["manifest"]).write_text("{")
    (run_dir / "steps" / "gate.json").write_text("{")
    Path(json.loads((run_dir / "steps" / "train-1.json").read_text())["manifest"]).parent.joinpath(
        "loss.jsonl"
    ).unlink()
    assert "the status file is damaged" in page(run_dir).text


def test_a_file_changed_since_is_left_out_of_the_page(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Curves that nobody trained, drawn as if they were the run's."""
    run_dir = make_run()
    losses = Path(json.loads((run_dir / "steps" / "train-1.json").read_text())["manifest"]).parent / "loss.jsonl"
    losses.write_text(losses.read_text().replace("1", "2"))
    assert Run.read(run_dir).file("train-1", "loss.jsonl") is None
    assert "left out" in capsys.readouterr().err


def test_settings_are_shown_without_secrets(make_run: MakeRun) -> None:
    """The page gets attached to mails and tickets."""
    html = render(Run.read(make_run()))
    assert "hunter2" not in html
    assert "[redacted]" in html


def test_step_writes_the_page_into_its_folder_and_the_run(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP shows the one, people open the other."""
    run_dir = make_run()
    StepStatus(name="report", status=Status.RUNNING, started=2_000_000.0).write(run_dir)
    monkeypatch.setenv("NVILA_RUN", str(run_dir))
    out = tmp_path / "out"
    out.mkdir()
    outcome = run(Settings(), {}, out, Environment.read())
    assert outcome.files == ("report.html",)
    assert outcome.result == Ending(outcome="succeeded", exit_code=Exit.DONE)
    html = (out / "report.html").read_text()
    assert html == (run_dir / "report.html").read_text()
    found = HEADLINE.search(html)
    assert found and "is serving" in found[2], "the step that writes the page runs while it does"


def test_branches_lie_beside_the_longest_way() -> None:
    """Lines through the dots of other steps say that these follow."""
    found = lanes(SHOWN)
    assert {name: lane for name, lane in found.items() if lane} == {"prune-image": 1, "prune-video": 2}
    assert set(found) == {row.name for row in SHOWN}


def test_step_unknown_to_the_picture_is_listed(make_run: MakeRun) -> None:
    """Other pipelines have other steps; their time must not vanish."""
    run_dir = make_run()
    record = {"name": "merge-lora", "status": "done", "started": 1_000_000.0, "ended": 1_000_060.0, "message": None}
    (run_dir / "steps" / "merge-lora.json").write_text(json.dumps(record))
    assert "merge-lora" in page(run_dir).text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (59.4, "59 s"), (127, "2 min 07 s"), (7500, "2 h 05 min")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    """127 seconds is not what anyone says."""
    assert duration(seconds) == text


def test_manifest_digests_link_the_steps(make_run: MakeRun) -> None:
    """Lineage on the page must be the manifests' own digests."""
    run_dir = make_run()
    status = json.loads((run_dir / "steps" / "quantize.json").read_text())
    assert Manifest.load(status["manifest"]).digest in render(Run.read(run_dir))
