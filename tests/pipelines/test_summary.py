"""What a run leaves behind: summary.json, the exit code, the closing words and the command that asks the model."""

import base64
import io
import json
import os
import stat
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console
from telling import evaluation, quantized_evaluation, retained, scored

from nvila.components.contracts.environment import Environment, entered
from nvila.components.contracts.errors import DataError, to_record
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.results.result import Result
from nvila.components.contracts.results.run import Registration, Resolution, Rollout
from nvila.components.contracts.steps import ROWS
from nvila.components.contracts.text import visible
from nvila.components.report.step import render
from nvila.components.runner.status import Run
from nvila.pipelines.local.peak_memory import MemorySampler, pss_bytes
from nvila.pipelines.local.run import _exit_code, _new_run, _point_latest
from nvila.pipelines.show import results as closing
from nvila.pipelines.show.summary import write_summary
from nvila.pipelines.show.watch import StepState, Watch, read_states, step_table

TOLD: dict[str, Result] = {
    "resolve": Resolution(recipe={"name": "tiny"}, slices={}),
    "evaluate": evaluation({"digits": scored(0.7, 0.1)}, {"initialize": {"digits": 0.1}, "train-4": {"digits": 0.6}}),
    "evaluate-quantized": quantized_evaluation({"digits": retained(0.69, full=0.7)}),
    "register": Registration(name="nvila-tiny", version="3", model_uri=""),
    "rollout": Rollout(
        endpoint="http://127.0.0.1:8321", model="nvila-tiny", version="3", decision="promoted", pinned={}
    ),
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run, as `execute` would have left it."""
    folder = tmp_path / "runs" / "r1"
    for index, name in enumerate(ROWS):
        _write_step(folder, name, "cached" if name == "initialize" else "done", started=100.0 + index)
    return folder


def _write_step(folder: Path, name: str, status: str, *, started: float = 100.0, code: int = 0) -> None:
    manifest = folder / "store" / name / "manifest.json"
    Manifest(step=name, key="k", kind="metrics", result=TOLD.get(name), seconds=2.0).save(manifest)
    record = {
        "name": name,
        "status": status,
        "started": started,
        "ended": started + 3,
        "seconds": 3.0,
        "exit_code": code,
        "manifest": None if code else str(manifest),
        "message": "because" if code else None,
    }
    (folder / "steps").mkdir(parents=True, exist_ok=True)
    (folder / "steps" / f"{name}.json").write_text(json.dumps(record))


def test_summary_holds_the_numbers_for_programs(run_dir: Path) -> None:
    """CI and dashboards read these names."""
    summary = write_summary(Run.read(run_dir), 60.0, 123, 0)
    assert json.loads((run_dir / "summary.json").read_text()) == summary.model_dump(mode="json")
    assert summary.decision == "promoted" and summary.endpoint == "http://127.0.0.1:8321"
    assert [step.name for step in summary.steps] == list(ROWS)
    told = json.loads((run_dir / "summary.json").read_text())
    row = told["accuracy"]["digits"]
    assert {name: (row[name]["metric"], row[name]["value"], row[name]["n"]) for name in row if row[name]} == {
        "full": ("accuracy", 0.7, 1000),
        "quantized": ("accuracy", 0.69, 1000),
        "majority": ("accuracy", 0.1, 1000),
        "question_only": ("accuracy", 0.3, 1000),
    }
    assert row["base"] is None and told["pipeline"] == "lifecycle"
    assert (told["schema_version"], told["stages"]["train-4"]["digits"]["value"]) == (3, 0.6)
    assert told["version"] == version("nvila") and told["error"] is told["failed_step"] is None


def test_summary_says_where_everything_lies(run_dir: Path) -> None:
    """Weights, quarantine and data docs lie below digests in the store, which nobody finds who is not told."""
    (run_dir / "report.html").write_text("x")
    finished = Run.read(run_dir)
    there, made = write_summary(finished, 60.0, 123, 0).paths, run_dir / "store"
    expected = {
        "run": run_dir,
        "log": run_dir / "log.txt",
        "summary": run_dir / "summary.json",
        "report": run_dir / "report.html",
        "weights": made / "train-5/model",
        "quantized": made / "quantize/model",
        "quarantine": made / "validate/quarantine.jsonl",
        "data_docs": made / "validate/data_docs.html",
    }
    assert there.model_dump() == {name: str(path) for name, path in expected.items()}
    (run_dir / "steps/train-5.json").unlink()
    (run_dir / "steps/validate.json").unlink()
    told = write_summary(Run.read(run_dir), 60.0, 123, 0).paths
    assert (told.weights, told.quarantine) == (str(made / "train-4/model"), None)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_failed_run_shows_its_steps_and_then_why(run_dir: Path, width: int) -> None:
    """A long message took the whole width, and nineteen lines were empty."""
    error = DataError(
        "too many records are spoilt " * 9,
        where="/data/plates",
        do="Mend them.",
        details={"quarantine": "/s/quarantine.jsonl"},
    )
    for name in list(ROWS)[3:]:
        (run_dir / "steps" / f"{name}.json").unlink()
    record = {"status": "failed", "exit_code": 2, "message": str(error), "error": to_record(error)}
    (run_dir / "steps/validate.json").write_text(json.dumps({"name": "validate", "started": 1, "ended": 3} | record))
    finished, out = Run.read(run_dir), io.StringIO()
    summary = write_summary(finished, 60.0, 0, 2)
    assert (summary.failed_step, summary.error) == ("validate", to_record(error))
    assert (summary.paths.quarantine, summary.paths.data_docs) == ("/s/quarantine.jsonl", "/s/data_docs.html")
    closing.show_closing(finished, summary, Console(file=out, width=width))
    table, _, behind = out.getvalue().partition("validate failed: ")
    rows = [line.split() for line in table.splitlines() if line.strip()][2:]
    assert [row[0] for row in rows] == list(ROWS) and all(len(row) > 2 for row in rows[:3])
    assert rows[2][1:] == ["failed", "2.0"] and rows[3][1:] == ["not", "reached"]
    assert str(error) in behind and behind.index(str(error)) < behind.index("log.txt")


@pytest.mark.parametrize("width", [40, 80])
def test_a_long_remark_leaves_room_for_the_steps(width: int) -> None:
    """So did the live table, as long as a step told of a long name."""
    states = [StepState(name, "running", 12.0, "reading " + "a/long/name/" * 30) for name in ROWS]
    with (console := Console(width=width)).capture() as shown:
        console.print(step_table(states))
    rows = [line.split() for line in shown.get().splitlines()[1:]]
    assert [row[:3] for row in rows] == [[name, "running", "12.0"] for name in ROWS]
    assert all(len(line) <= width for line in shown.get().splitlines())


def test_overhead_is_what_no_steps_function_used(run_dir: Path) -> None:
    """Skipped steps did no work, although their manifests say how long it once took."""
    worked = (len(ROWS) - 1) * 2.0
    assert write_summary(Run.read(run_dir), 60.0, 0, 0).seconds_overhead == pytest.approx(60.0 - worked)


@pytest.mark.parametrize(
    ("status", "code", "decision"), [("rejected", 3, "rejected"), ("failed", 2, "failed"), ("failed", 1, "failed")]
)
def test_the_first_step_that_failed_gives_the_exit_code(run_dir: Path, status: str, code: int, decision: str) -> None:
    """Later failures follow from the first; a script must see the first's code."""
    _write_step(run_dir, "gate", status, started=50.0, code=code)
    _write_step(run_dir, "report", "failed", started=90.0, code=1)
    finished = Run.read(run_dir)
    assert _exit_code(finished, 1) == code
    summary = write_summary(finished, 1.0, 0, code)
    assert (summary.decision, summary.message) == (decision, f"gate {status}: because")


def test_a_stopped_run_is_preempted_whatever_the_steps_say(run_dir: Path) -> None:
    """75 tells the launcher to run the same command again."""
    _write_step(run_dir, "train-1", "failed", code=1)
    assert _exit_code(Run.read(run_dir), Exit.PREEMPTED) == Exit.PREEMPTED


def test_a_step_that_could_not_reach_a_service_says_so(run_dir: Path) -> None:
    """`stopped` alone reads as if somebody had stopped it, and does not say whom to call."""
    _write_step(run_dir, "initialize", "preempted", started=50.0, code=75)
    finished = Run.read(run_dir)
    assert _exit_code(finished, 1) == Exit.PREEMPTED
    assert write_summary(finished, 1.0, 0, 75).message == "initialize stopped: because"


def test_a_step_that_vanished_is_a_fault(run_dir: Path) -> None:
    """A step killed by the kernel leaves `running` behind: that is no success."""
    (run_dir / "steps" / "train-3.json").write_text(json.dumps({"name": "train-3", "status": "running", "started": 1}))
    assert _exit_code(Run.read(run_dir), 1) == Exit.FAULT
    assert _exit_code(Run.read(run_dir), -9) == Exit.FAULT


def test_data_that_cannot_be_built_is_explained(tmp_path: Path) -> None:
    """No step has started then: the reason is only in the log, where nobody looks first."""
    folder = tmp_path / "r1"
    folder.mkdir()
    (folder / "log.txt").write_text("building\ndata/digits: other files lie here\n\n")
    finished = Run.read(folder)
    code = _exit_code(finished, Exit.USER)
    summary = write_summary(finished, 1.0, 0, code)
    assert (code, summary.decision) == (Exit.USER, "failed")
    assert summary.message == "data/digits: other files lie here"


def test_closing_words_tell_everything(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracy beside its baselines, the places, and the command must all be there."""
    monkeypatch.setattr(closing, "_held_out", lambda finished: (run_dir / "a.png", "Which digit?"))
    (run_dir / "report.html").write_text("x")
    (run_dir.parent / "mlflow.db").write_text("x")
    finished = Run.read(run_dir)
    out = io.StringIO()
    closing.show_closing(finished, write_summary(finished, 60.0, 2**30, 0), Console(file=out, width=140))
    for part in ("promoted", "1.0 GiB", "0.700", "0.690", "0.300", "blank picture", "report.html", "mlflow.db", "curl"):
        assert part in out.getvalue(), part


def test_closing_words_tell_how_each_stage_went(run_dir: Path) -> None:
    """A stage whose loader starved it, or whose loss rose, looked like any other at the end."""
    folder = run_dir / "store" / "train-4"
    losses = [{"step": i, "loss": None if i in (3, 4) else 8.0 - i} for i in range(8)]
    (folder / "loss.jsonl").write_text("\n".join(map(json.dumps, losses)))
    described = Manifest.load(folder / "manifest.json").model_copy(update={"files": describe_files(folder, ("loss*",))})
    described.save(folder / "manifest.json")
    attempt = {"began": 1.0, "startup_seconds": 18.0, "processes": 2, "device": "H100", "peak_flops": 1e12}
    reading = {"time": 3.0, "step": 8, "seconds": 2.0, "loss": 0.4, "lr": 0.1, "samples": 10, "tokens": 90}
    reading |= {"places": 120, "operations": 1e12, "waited_seconds": 0.2, "rss_bytes": 2**30}
    (folder / "meter.jsonl").write_text(f"{json.dumps(attempt)}\n{json.dumps(reading)}\n")
    finished, out = Run.read(run_dir), io.StringIO()
    summary = write_summary(finished, 60.0, 2**30, 0)
    closing.show_closing(finished, summary, Console(file=out, width=160))
    assert json.loads((run_dir / "summary.json").read_text())["training"]["train-4"]["mfu"] == 0.25
    for part in ("█▇▆  ▃▂▁", "8.000 to 1.000", "45 tokens/s", "MFU 25%", "0.01 GPU hours"):
        assert part in out.getvalue(), out.getvalue()


def _measured(run_dir: Path, monkeypatch: pytest.MonkeyPatch, accuracy: float, quantized: float) -> str:
    monkeypatch.setitem(TOLD, "evaluate", evaluation({"digits": scored(accuracy, blind=0.38)}))
    small = quantized_evaluation({"digits": retained(quantized, full=accuracy)})
    monkeypatch.setitem(TOLD, "evaluate-quantized", small)
    monkeypatch.setattr(closing, "_held_out", lambda finished: None)
    for name in ("evaluate", "evaluate-quantized"):
        _write_step(run_dir, name, "done")
    finished, out = Run.read(run_dir), io.StringIO()
    summary = write_summary(finished, 1.0, 0, 0)
    closing.show_closing(finished, summary, Console(file=out, width=140, force_terminal=True, color_system="standard"))
    assert summary.headline in out.getvalue()
    return out.getvalue()


@pytest.mark.parametrize(
    ("accuracy", "quantized", "said"),
    [(0.7, 0.7, None), (0.35, 0.35, "not above its baseline: digits"), (0.8, 0.45, "lost by quantization: digits")],
)
def test_only_a_good_model_gets_a_green_headline(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, accuracy: float, quantized: float, said: str | None
) -> None:
    """The last line that people read must not call a broken model a success, whatever its gates let pass."""
    shown = _measured(run_dir, monkeypatch, accuracy, quantized)
    assert (said or "learnt") in shown
    assert ("\x1b[1;32m" in shown) is (said is None) and ("\x1b[1;33m" in shown) is (said is not None)


@pytest.mark.parametrize("uri", [None, "https://ada:pass-word@mlflow.example/team"])
def test_closing_words_name_the_mlflow_that_was_told(run_dir: Path, uri: str | None) -> None:
    """With a server set they named the file that an earlier run had left here, where nothing of this run is."""
    (run_dir.parent / "mlflow.db").touch()
    finished, out = Run.read(run_dir), io.StringIO()
    with entered(Environment(mlflow_tracking_uri=uri)):
        closing.show_closing(finished, write_summary(finished, 60.0, 2**30, 0), Console(file=out, width=140))
    (line,) = [line for line in out.getvalue().splitlines() if line.startswith("MLflow")]
    assert ("mlflow.example/team" in line) == (uri is not None) == ("mlflow.db (`nvila ui --runs " not in line)
    assert "pass-word" not in line


def test_a_run_without_pictures_ends_well(run_dir: Path) -> None:
    """The example could not be made of clips alone, nor of records that are gone, and its error was the end of a run
    that had come through."""
    finished, out = Run.read(run_dir), io.StringIO()
    closing.show_closing(finished, write_summary(finished, 60.0, 2**30, 0), Console(file=out, width=140))
    assert "curl" not in out.getvalue() and "http://127.0.0.1:8321" in out.getvalue()


@pytest.mark.parametrize("name", [
    "some picture.png", "a'$(touch ran)'.png", "`touch ran`.png", 'a"; touch ran; ".png', "a\ntouch ran\n.png",
    "-n.png", "a\x1b[31m\\ '!touch.png", "a\u202egnp.exe", os.fsdecode(b"caf\xe9.png"), "a$IFS;touch ran&#|.png",
    "\u200b.png",
])  # fmt: skip
@pytest.mark.parametrize("question", [
    "Which digit is in row 2?", 'It\'s "5" $HOME `id` \\ back? !!', "'; touch ran; '\n$(touch ran)",
    ";base64,@ \x1b[2J\x7f",
])  # fmt: skip
def test_the_curl_command_works_by_copy_and_paste(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question: str, name: str
) -> None:
    """The shell must hand over exactly the picture and the question, and run nothing that their texts say."""
    picture = tmp_path / name
    picture.write_bytes(bytes(range(256)))
    monkeypatch.setattr(closing, "_held_out", lambda finished: (picture, question))
    monkeypatch.setattr(closing, "short", lambda path: path.name)
    fake = tmp_path / "bin" / "curl"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\0" "$a"; done\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    environment = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
    command = closing.curl_example(Run.read(run_dir))
    assert command is not None and visible(command) == command
    ran = subprocess.run(
        ["bash", "-c", command], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    args = ran.stdout.split("\0")
    assert "http://127.0.0.1:8321/v1/chat/completions" in args
    body = json.loads(args[args.index("-d") + 1])
    image, text = body["messages"][0]["content"]
    assert text["text"] == question and body["model"] == "nvila-tiny"
    assert base64.b64decode(image["image_url"]["url"].partition(",")[2]) == bytes(range(256))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("name", "kind"), [("a.JPG", "jpeg"), ("a.webp", "webp"), ("a.gif", "gif"), ("-'a", "png")])
def test_a_photograph_reaches_curl_too(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    """Linux refuses an argument above 128 KiB: the printed command failed for every photograph."""
    picture = tmp_path / name
    picture.write_bytes(bytes(range(256)) * 2000)
    monkeypatch.setattr(closing, "_held_out", lambda finished: (picture, "It's a <image> of what? %s"))
    monkeypatch.setattr(closing, "short", lambda path: path.name)
    fake = tmp_path / "bin" / "curl"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\ncat\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    command = closing.curl_example(Run.read(run_dir))
    assert command is not None
    environment = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}"}
    ran = subprocess.run(["bash", "-c", command], env=environment, cwd=tmp_path, capture_output=True, check=True)
    parts = json.loads(ran.stdout)["messages"][0]["content"]
    assert "".join(part["text"].strip() for part in parts if part["type"] == "text") == "It's aof what? %s"
    (url,) = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert url.startswith(f"data:image/{kind};base64,")
    assert base64.b64decode(url.partition(",")[2]) == picture.read_bytes()


HOSTILE = "[red]:dog:\x1b[31m\r\u202e[/x]"


def test_names_and_messages_steer_no_terminal(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Source names, notes and messages come from recipes, data, servers: no escape or markup of them counts."""
    monkeypatch.setitem(TOLD, "evaluate", evaluation({HOSTILE: scored(0.7)}, {"initialize": {HOSTILE: 0.1}}))
    served = Rollout(endpoint=HOSTILE, model=HOSTILE, version="3", decision=HOSTILE, pinned={})
    monkeypatch.setitem(TOLD, "rollout", served)
    monkeypatch.setattr(closing, "_held_out", lambda finished: (run_dir / f"{HOSTILE}.png", HOSTILE))
    for name in ("evaluate", "rollout"):
        _write_step(run_dir, name, "done")
    _write_step(run_dir, "report", "failed", code=1)
    path = run_dir / "steps" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"message": f"{HOSTILE} password=hunter2"}))
    finished, out = Run.read(run_dir), io.StringIO()
    console = Console(file=out, width=400)
    with Watch(HOSTILE, lambda: read_states(run_dir, ROWS), console) as watch:
        watch.refresh()
    summary = write_summary(finished, 1.0, 0, 1)
    closing.show_closing(finished, summary.model_copy(update={"decision": HOSTILE, "run": HOSTILE}), console)
    shown = out.getvalue()
    assert all(line.isprintable() for line in shown.splitlines())
    assert shown.count(visible(HOSTILE)) >= 7
    assert "hunter2" not in summary.model_dump_json()


def test_latest_always_points_at_a_whole_run(tmp_path: Path) -> None:
    """Replaced in one step, also over an older link; two runs in one second do not share a folder."""
    first, second = _new_run(tmp_path, "tiny"), _new_run(tmp_path, "tiny")
    assert first != second
    _point_latest(first)
    _point_latest(second)
    assert (tmp_path / "latest").resolve() == second.resolve()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_memory_counts_children_and_forgets_nothing(tmp_path: Path) -> None:
    """The peak is that of the whole tree: training runs in grandchildren."""
    sampler = MemorySampler(os.getpid(), tmp_path)
    sampler.sample()
    alone = sampler.peak_pss_bytes
    assert alone > 0
    code = "x = bytearray(80_000_000); print(1, flush=True); input()"
    with subprocess.Popen(["python3", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        sampler.sample()
        child.communicate("\n")
    assert sampler.peak_pss_bytes > alone + 70_000_000
    peak = sampler.peak_pss_bytes
    sampler.sample()
    assert sampler.peak_pss_bytes == peak and pss_bytes(child.pid) == 0


def test_plain_output_says_when_steps_start_and_end(run_dir: Path) -> None:
    """A log of CI has no live table: each change is one line, once."""
    out = io.StringIO()
    with Watch(run_dir.name, lambda: read_states(run_dir, ROWS), Console(file=out, width=140)) as watch:
        watch.refresh()
        watch.refresh()
    lines = out.getvalue().splitlines()
    assert len(lines) == len(ROWS)
    assert any("initialize: cached in 3.0 s" in line for line in lines)


def test_messages_with_brackets_are_shown_as_they_are(run_dir: Path) -> None:
    """The terminal library reads [/x] as markup and stops the run's last words with an error of its own."""
    _write_step(run_dir, "validate", "failed", code=2)
    path = run_dir / "steps" / "validate.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"message": "no such path [/data] [bold]"}))
    finished = Run.read(run_dir)
    out = io.StringIO()
    closing.show_closing(
        finished, write_summary(finished, 1.0, 0, 2).model_copy(update={"endpoint": None}), Console(file=out, width=140)
    )
    assert out.getvalue().count("no such path [/data] [bold]") == 1


@pytest.mark.parametrize(
    "left",
    [
        "",
        '{"name": "train-1", "status": "ru',
        '{"name": "train-1", "status": "done", "started": NaN, "ended": 1}',
        '{"name": "train-1", "status": "running", "started": -Infinity}',
        '{"name": "train-1", "status": "done", "started": 1, "ended": 1e999}',
    ],
)
def test_a_damaged_status_file_is_shown_as_such(run_dir: Path, left: str) -> None:
    """A node that goes down leaves files of any content; the page and the table are there to tell of it."""
    (run_dir / "steps" / "train-1.json").write_text(left)
    run = Run.read(run_dir)
    assert "the status file is damaged" in str(run.step("train-1").message)
    assert "the status file is damaged" in render(run)
    assert [state.note for state in read_states(run_dir, ROWS) if "damaged" in state.note]
    write_summary(run, 1.0, 1, 1)


def test_a_status_file_speaks_for_its_own_step(run_dir: Path) -> None:
    """A file that was copied by hand would give another step two rows and its own none."""
    (run_dir / "steps" / "train-1.json").write_text('{"name": "evaluate", "status": "running", "started": 1}')
    assert [state.name for state in read_states(run_dir, ROWS)] == list(ROWS)


@pytest.mark.parametrize("left", ["", "[", "[]", "null", '{"what": 1}', "[" * 100_000])
def test_damaged_progress_is_none(run_dir: Path, left: str) -> None:
    """The terminal reads it four times a second, of steps that are killed at any time."""
    (run_dir / "progress").mkdir()
    (run_dir / "progress" / "train-1.json").write_text(left)
    assert not [state.note for state in read_states(run_dir, ROWS) if state.note]
