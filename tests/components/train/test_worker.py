"""The training loop with the real DeepSpeed engine, in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import DataError, Preempted, TrainingError
from nvila.components.contracts.exits import Exit
from nvila.components.train.data import stage_samples
from nvila.components.train.job import Job
from nvila.components.train.loop import StopRequest, train
from nvila.components.train.losses import read_losses

pytestmark = pytest.mark.usefixtures("one_rank")
MakeJob = Callable[..., Job]


class Stop(StopRequest):
    """A request that comes after some steps, without signals."""

    def __init__(self, after: int | None = None) -> None:
        self._after = after
        self._looks = 0

    @property
    def asked(self) -> bool:  # type: ignore[override]
        self._looks += 1
        return self._after is not None and self._looks >= self._after


def weights(folder: str | Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    files = sorted(Path(folder, "model").rglob("*.safetensors")) or sorted(Path(folder).rglob("*.safetensors"))
    return {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def changed_parts(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    assert before.keys() == after.keys()
    return {name.partition(".")[0] for name in before if not before[name].equal(after[name].to(before[name].dtype))}


def losses(job: Job) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_losses(Path(job.out, "loss.jsonl"))]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "parts", [["mm_projector"], ["vision_tower", "mm_projector"], ["mm_projector", "llm"]], ids=lambda p: "+".join(p)
)
def test_only_the_parts_of_the_row_learn(make_job: MakeJob, parts: list[str], precision: str) -> None:
    """A stage that trains what its row freezes, or freezes what it should train, is another recipe than the paper's."""
    job = make_job("a", stage={"trainable": parts, "data": {"colours.captions": 2}}, run={"precision": precision})
    train(job, Stop())
    before = weights(job.model)
    if precision == "bf16":
        before = {name: tensor.bfloat16() for name, tensor in before.items()}
    assert changed_parts(before, weights(job.out)) == set(parts)
    assert [step for step, _ in losses(job)] == [1, 2, 3]


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_weights_are_loaded_in_the_precision_of_training(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, precision: str, size: int
) -> None:
    """Each GPU holds all weights before ZeRO divides them: 15 billion in fp32 do not leave room for the division."""

    def look(model: Any, *_: Any) -> None:
        assert {parameter.element_size() for parameter in model.parameters()} == {size}
        raise Preempted("seen enough")

    monkeypatch.setattr("nvila.components.train.loop.start", look)
    with pytest.raises(Preempted, match="seen enough"):
        train(make_job("a", run={"precision": precision}), Stop())


@pytest.mark.parametrize(("precision", "zero"), [("fp32", 0), ("fp32", 2), ("bf16", 0), ("bf16", 1), ("bf16", 3)])
def test_a_stopped_stage_ends_as_if_it_had_not_been_stopped(make_job: MakeJob, precision: str, zero: int) -> None:
    """A resume that repeats or skips samples, or forgets AdamW's moments or the schedule, trains another model."""
    run = {"precision": precision, "zero": zero}
    # DeepSpeed looks for the files of a checkpoint by patterns.
    straight, stopped = make_job("straight", run=run), make_job("stopped [0-9]?*", run=run)
    train(straight, Stop())
    with pytest.raises(Preempted, match="after 2 of 6 steps"):
        train(stopped, Stop(after=2))
    assert not Path(stopped.out, "model").exists()
    train(stopped, Stop())
    assert losses(stopped) == losses(straight)
    assert [step for step, _ in losses(straight)] == [1, 2, 3, 4, 5, 6]
    assert not changed_parts(weights(straight.out), weights(stopped.out))
    assert changed_parts(weights(straight.model), weights(straight.out)) == {"vision_tower", "mm_projector", "llm"}


def test_a_crash_behind_a_checkpoint_repeats_only_what_came_after(make_job: MakeJob) -> None:
    """Steps logged after the last checkpoint are run again: kept in the log they would count twice."""
    straight, crashed = make_job("straight"), make_job("crashed")
    train(straight, Stop())
    with pytest.raises(Preempted):
        train(crashed, Stop(after=3))
    log = Path(crashed.out, "loss.jsonl")
    log.write_text(log.read_text() + '{"step": 4, "loss": 99.0, "lr": 0, "tokens": 1}\n{"step": 5, "lo')
    train(crashed, Stop())
    assert losses(crashed) == losses(straight)


def test_the_newest_two_checkpoints_stay(make_job: MakeJob) -> None:
    """Optimizer states of every minute of an eight-billion-parameter stage fill any disk."""
    job = make_job("a", run={"checkpoint_seconds": 0.0, "keep_best": False})
    with pytest.raises(Preempted):
        train(job, Stop(after=4))
    folder = Path(job.out, "checkpoints")
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-3", "step-4"]


def test_micro_batches_give_the_same_model(make_job: MakeJob) -> None:
    """Gradient accumulation that steps too often or scales wrongly is another learning rate."""
    whole, parts = make_job("whole"), make_job("parts", stage={"micro_batch": 4})
    train(whole, Stop())
    train(parts, Stop())
    assert [loss for _, loss in losses(parts)] == pytest.approx([loss for _, loss in losses(whole)], abs=1e-5)
    rows = [read_losses(Path(job.out, "loss.jsonl")) for job in (whole, parts)]
    assert [r["lr"] for r in rows[0]] == [r["lr"] for r in rows[1]]
    assert [r["tokens"] for r in rows[0]] == [r["tokens"] for r in rows[1]]


def test_longer_rows_are_cut_and_the_limit_is_not_saved(make_job: MakeJob) -> None:
    """A stage's `max_length_tokens` without effect, or one that shortens the model for good."""
    from nvila.components.model.checkpoint.native import read_config

    with pytest.raises(DataError, match=r"no supervised token is left .* = 8 \(\d+: colours/sft/"):
        train(make_job("short", stage={"max_length_tokens": 8}), Stop())
    job = make_job("long", stage={"max_length_tokens": 128})
    train(job, Stop())
    assert read_config(Path(job.out, "model")).max_length_tokens == 256


def test_a_loss_that_is_not_finite_ends_the_stage(make_job: MakeJob, tmp_path: Path, small: Any) -> None:
    """Training on after a NaN wastes hours and overwrites the last good checkpoint."""
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(small.model.dir("model"), broken)
    file = broken / "mm_projector" / "model.safetensors"
    save_file({name: tensor * 0 + 1e38 for name, tensor in load_file(file).items()}, file)
    job = make_job("a", model=str(broken))
    with pytest.raises(TrainingError, match=r"optimizer step 0: the loss is not finite .*learning_rate"):
        train(job, Stop())
    assert not Path(job.out, "model").exists()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"data": {"colours.sft": 1, "clips.captions": 1}}, "no samples in clips.captions"),
        ({"data": {"clips.sft": 1}, "batch": 9}, "8 samples, which do not fill one batch of 9"),
    ],
)
def test_a_stage_without_samples_is_the_users_error(make_job: MakeJob, stage: dict[str, Any], message: str) -> None:
    """A stage that silently trains nothing hands on an untrained model under a new name."""
    with pytest.raises(DataError, match=message):
        train(make_job("a", stage=stage), Stop())


def test_only_kept_samples_are_trained_on(make_job: MakeJob, small: Any, tmp_path: Path) -> None:
    """A pruned row that takes pruned samples makes the prune step a decoration."""
    import pyarrow
    import pyarrow.parquet as parquet

    ids = [f"colours/sft/{n}-{q}" for n in range(12) for q in "ab"]
    kept = tmp_path / "scores.parquet"
    parquet.write_table(pyarrow.table({"id": ids, "kept": [i.endswith("a") for i in ids]}), kept)
    job = make_job("a", stage={"pruned": True, "data": {"colours.sft": 2, "colours.captions": 1}}, kept=[str(kept)])
    train(job, Stop())
    assert len(losses(job)) == (2 * 12 + 12) // 8


def test_a_pruned_stage_without_scores_is_refused(make_job: MakeJob, tmp_path: Path) -> None:
    """A table that was lost, or is of other sources, must not read as one that keeps nothing, or everything."""
    import pyarrow
    import pyarrow.parquet as parquet

    other = tmp_path / "scores.parquet"
    parquet.write_table(pyarrow.table({"id": ["clips/sft/1"], "kept": [True]}), other)
    for kept in ([], [str(other)]):
        job = make_job("a", stage={"pruned": True, "data": {"colours.sft": 1, "clips.sft": 1}}, kept=kept)
        with pytest.raises(DataError, match=r"no scores of .*colours, of which stage .* takes what pruning kept"):
            train(job, Stop())


@pytest.fixture
def copied(small: Any, tmp_path: Path) -> Callable[..., Path]:
    """The data in a folder of its own; `questions` replaces some by id."""
    import shutil

    import pyarrow.parquet as parquet

    from nvila.components.data.samples import write_samples

    root = tmp_path / "copy"
    shutil.copytree(small.root, root)
    rows = parquet.read_table(small.samples.path("samples.parquet")).to_pylist()

    def copy(questions: dict[str, str] | None = None) -> Path:
        for row in rows:
            if question := (questions or {}).get(row["id"]):
                turns = json.loads(row["conversations"])
                row["conversations"] = json.dumps([{"from": "human", "value": f"<image>\n{question}"}, turns[1]])
        write_samples(root / "samples.parquet", [row | {"root": str(root)} for row in rows])
        return root / "samples.parquet"

    return copy


LONG = {"colours/sft/5-b": "word " * 300}


def test_a_picture_that_vanished_is_named(make_job: MakeJob, copied: Callable[..., Path]) -> None:
    """The traceback of a loader's process does not tell the user which file is gone. Two of 24 are too many."""
    table = copied()
    (table.parent / "sft-3.png").unlink()
    with pytest.raises(DataError, match=r"2 of 24 records .*colours/sft/3-. in .*sft-3\.png") as caught:
        train(make_job("a", samples=str(table)), Stop())
    assert caught.value.exit_code == Exit.USER
    assert "Traceback" not in str(caught.value) and "max_skipped_share" in str(caught.value)


@pytest.mark.parametrize("micro_batch", [1, 8])
def test_unusable_samples_are_left_out_and_named(
    make_job: MakeJob, copied: Callable[..., Path], capsys: pytest.CaptureFixture[str], micro_batch: int
) -> None:
    """One record of a million whose answer is cut off whole, or whose picture is damaged, ended the stage."""
    table = copied(LONG)
    (table.parent / "sft-3.png").write_bytes(b"no picture")
    run = {"max_skipped_share": 0.1}
    straight, stopped = (
        make_job(name, samples=str(table), stage={"micro_batch": micro_batch}, run=run) for name in ("a", "b")
    )
    train(straight, Stop())
    said = capsys.readouterr().err
    assert "skipped colours/sft/5-b: no supervised token is left" in said and "sft-3.png" in said
    rows = [json.loads(line) for line in Path(straight.out, "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == sorted(["colours/sft/3-a", "colours/sft/3-b", "colours/sft/5-b"] * 2)
    records = read_losses(Path(straight.out, "loss.jsonl"))
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]

    with pytest.raises(Preempted):
        train(stopped, Stop(after=3))
    train(stopped, Stop())
    assert losses(stopped) == losses(straight)
    assert not changed_parts(weights(straight.out), weights(stopped.out))
    logs = [Path(job.out, "skipped.jsonl").read_text() for job in (straight, stopped)]
    assert logs[0] == logs[1]


def test_what_was_skipped_before_a_resume_counts(make_job: MakeJob, copied: Callable[..., Path]) -> None:
    """A stage that is stopped often enough would never have skipped too many."""
    table = copied(LONG)
    job = make_job("a", samples=str(table), run={"max_skipped_share": 0.04})
    with pytest.raises(Preempted):
        train(job, Stop(after=5))
    assert Path(job.out, "skipped.jsonl").read_text()
    (table.parent / "sft-4.png").unlink()
    strict = job.model_copy(update={"run": job.run.model_copy(update={"max_skipped_share": 0.0})})
    with pytest.raises(DataError, match=r"1 of 24 records .*5-b"):
        train(strict, Stop())


@pytest.mark.parametrize(("precision", "zero"), [("fp32", 0), ("bf16", 0), ("fp32", 3)])
def test_a_batch_without_usable_samples_changes_nothing(
    make_job: MakeJob, copied: Callable[..., Path], precision: str, zero: int
) -> None:
    """AdamW moves weights on gradients of zero; and a step left out would shift the schedule of all that follow."""
    from nvila.components.train.engine import Engine

    seen: list[tuple[bool, float]] = []
    take = Engine.step

    def step(engine: Engine, supervised: int, **wanted: bool) -> bool:
        before = [p.detach().clone() for p in _own(engine)]
        rate = engine.learning_rate
        finite = take(engine, supervised, **wanted)
        seen.append((all(p.equal(b) for p, b in zip(_own(engine), before, strict=True)), rate))
        return finite

    def _own(engine: Engine) -> list[Any]:
        return [getattr(p, "ds_tensor", p) for p in engine.deepspeed.module.llm.parameters()]

    stage = {"batch": 1, "data": {"colours.sft": 1}, "weight_decay": 0.1, "learning_rate": 1e-2}
    job = make_job("a", samples=str(copied(LONG)), stage=stage, run={"precision": precision, "zero": zero})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", step)
        train(job, Stop())
    records = read_losses(Path(job.out, "loss.jsonl"))
    empty = [record["loss"] is None for record in records]
    assert sum(empty) == 1 and len(empty) == 24
    assert [still for still, _ in seen] == empty
    assert len({record["lr"] for record in records}) > 22


def test_batches_do_not_depend_on_the_number_of_processes(make_job: MakeJob) -> None:
    """Two processes that together see other batches than one make a resumed or rescaled run another run."""
    job = make_job("a")
    samples = stage_samples(job.stage, Path(job.samples), [], 0, Path(job.out))
    shares = [samples.share(8, rank, 2).ids for rank in (0, 1)]
    for i in range(len(samples) // 8):
        assert [name for share in shares for name in share[4 * i : 4 * i + 4]] == samples[8 * i : 8 * i + 8].ids
    assert samples.share(8, 0, 1).ids == samples.ids
