"""Which checkpoint an interrupted stage goes on from when the machine has damaged some."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_worker import Stop, changed_parts, losses, weights

from nvila.components.contracts.errors import Preempted
from nvila.components.train.checkpoints import ABOUT, BEST, RECORD, partial, publish
from nvila.components.train.job import Job
from nvila.components.train.loop import train
from nvila.components.train.losses import LOSSES, SKIPPED, read_losses

MakeJob = Callable[..., Job]
Made = Callable[[str, Callable[[], Job]], Path]


def _largest(checkpoint: Path) -> Path:
    return max(checkpoint.iterdir(), key=lambda path: path.stat().st_size)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": lambda at: _flip(_largest(at / "step-4")),
    "a torn file": lambda at: _tear(_largest(at / "step-4")),
    "a file of zeros": lambda at: _zero(_largest(at / "step-4")),
    "a missing file": lambda at: _largest(at / "step-4").unlink(),
    "a torn record": lambda at: _tear(at / "step-4" / RECORD),
    "a missing record": lambda at: (at / "step-4" / RECORD).unlink(),
    "a link": lambda at: _link(_largest(at / "step-4")),
    "a file in its place": lambda at: (shutil.rmtree(at / "step-4"), (at / "step-4").touch()),
    "no files": lambda at: [path.unlink() for path in (at / "step-4").iterdir()],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[], Job]], Path]:
    """`made("name", make)`: a copy's source, the folder that a job was trained in, once for all tests here."""
    folder, known = tmp_path_factory.mktemp("made"), set[str]()

    def once(name: str, make: Callable[[], Job]) -> Path:
        if name not in known:
            shutil.copytree(make().out, folder / name)
            known.add(name)
        return folder / name

    return once


def _straight(job: Job) -> Job:
    train(job, Stop())
    return job


def _interrupted(job: Job) -> Job:
    with pytest.raises(Preempted):
        train(job, Stop(after=4))
    return job


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("damage", [*DAMAGE, "latest is empty", "latest is noise", "both"])
def test_a_damaged_checkpoint_is_not_gone_on_from(
    make_job: MakeJob, made: Made, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """A stage that fails at every start, or goes on from zeros, because of the last thing before a power cut."""
    how = {"checkpoint_seconds": 0.0, "keep_best": False}
    straight = made("straight", lambda: _straight(make_job("straight")))
    job = make_job("damaged", run=how)
    shutil.copytree(made("stopped", lambda: _interrupted(make_job("stopped", run=how))), job.out, dirs_exist_ok=True)
    at = Path(job.out, "checkpoints")
    said = {"latest is empty": "step-4\n", "latest is noise": "step-4\n", "both": "training starts anew"}
    if damage == "both":
        for name in ("step-3", "step-4"):
            _flip(_largest(at / name))
    elif damage in DAMAGE:
        DAMAGE[damage](at)
    else:
        (at / "latest").write_bytes(b"" if "empty" in damage else b"\xff\x00step-9")
    capsys.readouterr()
    train(job, Stop())
    lines = [line for line in capsys.readouterr().err.splitlines() if "checkpoint" in line]
    assert (
        len(lines) == 1 and said.get(damage, "step-3, 1 step before the newest (step-4 is not sound") in f"{lines[0]}\n"
    )
    assert Path(job.out, LOSSES).read_bytes() == (straight / LOSSES).read_bytes()
    assert not changed_parts(weights(straight), weights(job.out))


@pytest.mark.usefixtures("one_rank")
def test_a_save_that_was_cut_off_is_not_in_the_way(make_job: MakeJob) -> None:
    """Half a checkpoint under the name of a whole one is the one that would be loaded."""
    job = make_job("a", run={"checkpoint_seconds": 0.0, "keep_best": False})
    with pytest.raises(Preempted):
        train(job, Stop(after=2))
    at = Path(job.out, "checkpoints")
    (at / "step-2").rename(at / "partial-step-3")
    (at / "partial-step-3" / RECORD).unlink()
    train(job, Stop())
    assert [step for step, _ in losses(job)] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in at.iterdir()) == ["latest", "step-4", "step-5"]


FOREIGN = '{"step": 1, "loss": "low", "id": 5}\n[]'
SKIPPING: dict[str, Any] = {"stage": {"max_length_tokens": 33}, "run": {"max_skipped_share": 1.0}}
LOGS: dict[str, Callable[[Path, Path], Any]] = {
    "cut off": lambda losses, skipped: (_tear(losses), _tear(skipped)),
    "gone": lambda losses, skipped: (losses.unlink(), skipped.unlink()),
    "of zeros": lambda losses, skipped: (_zero(losses), _zero(skipped)),
    "another's": lambda losses, skipped: [path.write_text(FOREIGN) for path in (losses, skipped)],
    "a folder": lambda losses, skipped: (losses.unlink(), losses.mkdir()),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("damage", LOGS)
def test_a_damaged_log_is_as_the_checkpoint_has_it(make_job: MakeJob, made: Made, damage: str) -> None:
    """A curve with holes in a manifest that says nothing of them; and samples that were skipped, counted as used."""
    straight = made("skipping", lambda: _straight(make_job("straight", **SKIPPING)))
    whole = {name: (straight / name).read_bytes() for name in (LOSSES, SKIPPED)}
    assert whole[SKIPPED]
    job = make_job("damaged", **SKIPPING)
    stopped = made("skipping, stopped", lambda: _interrupted(make_job("stopped", **SKIPPING)))
    shutil.copytree(stopped, job.out, dirs_exist_ok=True)
    LOGS[damage](Path(job.out, LOSSES), Path(job.out, SKIPPED))
    train(job, Stop())
    assert {name: Path(job.out, name).read_bytes() for name in (LOSSES, SKIPPED)} == whole


def test_the_best_checkpoint_stays_besides_the_newest(tmp_path: Path) -> None:
    """Weights from before a loss went up for good, thrown away with all that could have been gone back to."""
    for step, loss in enumerate((3.0, 1.0, None, 2.0, 2.5), 1):
        at = tmp_path / partial(step)
        at.mkdir()
        (at / ABOUT).write_text(json.dumps({"step": step, "loss": loss}))
        publish(tmp_path, step, keep=2, keep_best=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest", "step-2", "step-4", "step-5"]
    assert (tmp_path / BEST).read_text() == "step-2"


def test_noise_in_a_log_takes_no_record_along(tmp_path: Path) -> None:
    """The report and MLflow look at a log while it is written, and after a machine went down."""
    path = tmp_path / "loss.jsonl"
    good = ['{"step": 1, "loss": 3.5}', '{"step": 2, "loss": null}', '{"step": 3, "loss": 2.5}']
    noise = ["\0\0\0", '{"step": "2", "loss": 1}', "[1]", '{"step": 2, "note": "\u2028 \x85"}', '{"step": 4, "lo']
    path.write_text("\n".join([good[0], *noise[:4], *good[1:], noise[4]]), encoding="utf-8")
    assert [record["step"] for record in read_losses(path)] == [1, 2, 3]
