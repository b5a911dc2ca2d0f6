"""DeltaLoss: the arithmetic, the folds, and references that are made once and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from buckets import Bucket

from nvila.components.contracts.errors import DataError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.sealed import seal
from nvila.components.prune import step

TINY: dict[str, Any] = {
    "decoder": {"hidden": 16, "layers": 1, "heads": 1, "kv_heads": 1, "mlp": 32},
    "epochs": 1,
    "batch": 16,
}
IDS = [f"colours/sft/{n}-{q}" for n in range(12) for q in "ab"]


def settings(sources: list[str] | None = None, **prune: Any) -> step.Settings:
    prune = {"small": TINY, "large": TINY} | prune
    return step.Settings.model_validate({"prune": prune, "sources": sources or ["colours"], "seed": 0})


def inputs(small: Any) -> dict[str, Manifest]:
    return {"samples": small.samples, "base": small.model}


def table(out: Path) -> dict[str, dict[str, Any]]:
    import pyarrow.parquet as parquet

    return {row["id"]: row for row in parquet.read_table(out / "scores.parquet").to_pylist()}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """References are made in this process; the list gets what was made."""
    from nvila.components.prune.references import work

    made: list[Any] = []

    def make(jobs: list[Any]) -> None:
        for job in jobs:
            work(job)
            made.append((job.name, job.fold))

    monkeypatch.setattr(step, "_make", make)
    return made


def results(out: Path, accuracy: dict[str, float], losses: dict[str, Callable[[str], tuple[float, int]]]) -> None:
    """Results as the four references leave them, each fold with half of the samples."""
    (out / "references").mkdir(parents=True)
    for name, loss in losses.items():
        for fold in (0, 1):
            found = {sample: loss(sample) for i, sample in enumerate(IDS) if i // 2 % 2 == fold}
            content = {"accuracy": {"colours": accuracy[name]}, "weights": {}, "losses": found, "skipped": []}
            (out / "references" / f"{name}-{fold}.json").write_text(json.dumps(content))
            sealed = out / "references" / f"{name}-{fold}.sealed.json"
            seal(out / "references", sealed, [f"{name}-{fold}.json"])


@pytest.mark.parametrize("score", ["sum", "mean"])
def test_delta_is_the_small_loss_minus_the_large_one(small: Any, tmp_path: Path, score: str) -> None:
    """The wrong sign keeps exactly the distracting samples; the wrong length norm keeps long answers or short ones."""
    losses: dict[str, Callable[[str], tuple[float, int]]] = {
        "small": lambda i: (float(IDS.index(i)), 4),
        "large": lambda i: (2.0, 4),
    }
    results(tmp_path, {"small": 0.25, "large": 0.5}, losses)
    outcome = step.run(settings(score=score, keep_ratio=0.25), inputs(small), tmp_path)
    rows = table(tmp_path)
    assert sorted(rows) == sorted(IDS)
    divisor = {"sum": 1, "mean": 4}[score]
    assert [rows[i]["delta"] for i in IDS] == [(n - 2.0) / divisor for n in range(24)]
    assert [rows[i]["loss_small"] - rows[i]["loss_large"] for i in IDS] == [rows[i]["delta"] for i in IDS]
    assert {i for i in IDS if rows[i]["kept"]} == set(IDS[-6:])
    assert {row["answer_tokens"] for row in rows.values()} == {4}
    found = outcome.values["sources"]["colours"]
    assert (found["n"], found["kept"], found["mean_delta"]) == (24, 6, 9.5 / divisor)
    assert (found["accuracy_small"], found["accuracy_large"], found["informative"]) == (0.25, 0.5, True)


@pytest.mark.parametrize(("small_accuracy", "large_accuracy"), [(0.5, 0.5), (0.6, 0.5)])
def test_scores_of_a_large_reference_that_is_no_better_are_called_uninformative(
    small: Any, tmp_path: Path, small_accuracy: float, large_accuracy: float
) -> None:
    """DeltaLoss of two equal models is noise; believed, it throws away half of the data at random."""
    results(
        tmp_path,
        {"small": small_accuracy, "large": large_accuracy},
        {"small": lambda i: (1.0, 1), "large": lambda i: (1.0, 1)},
    )
    assert not step.run(settings(), inputs(small), tmp_path).values["sources"]["colours"]["informative"]


def test_losses_are_those_of_the_answer(small: Any, tmp_path: Path, here: list[Any]) -> None:
    """Scored in batches, with padding and other pictures beside it, a sample's loss must be its own.

    Compared with the model's training loss of each sample alone, times its number of answer tokens.
    """
    import torch

    from nvila.components.data.samples import read_samples
    from nvila.components.model.checkpoint import load_native
    from nvila.components.model.feed import Feed

    path = str(small.model.dir("model"))
    outcome = step.run(
        settings(["clips", "colours"], small={"path": path}, large={"path": path}), inputs(small), tmp_path
    )
    assert here == [("large", None), ("small", None)]
    rows = table(tmp_path)
    model, tokenizer = load_native(path, dtype="bfloat16")
    samples = read_samples(small.samples.path("samples.parquet"), split="sft")
    for sample, batch in zip(samples, Feed(tokenizer, model.config).batches(samples, 1), strict=True):
        tokens = int((batch.labels != -100).sum())
        with torch.no_grad():
            loss = float(model(**batch.forward_arguments()).loss) * tokens
        assert rows[sample.id]["answer_tokens"] == tokens
        assert rows[sample.id]["loss_small"] == pytest.approx(loss, rel=0.02)
        assert rows[sample.id]["delta"] == 0.0
    assert outcome.values["sources"]["clips"]["kept"] == 4


def test_no_reference_scores_a_picture_it_was_trained_on(
    small: Any, tmp_path: Path, here: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model scores what it learnt by heart as easy: pruning would then follow the folds, not the data."""
    from nvila.components.prune import references

    trained: list[set[Path]] = []
    scored: list[set[Path]] = []
    ids: list[str] = []
    train, losses = references.train, references._losses

    def watch_train(model: Any, feed: Any, samples: Any, *rest: Any) -> None:
        trained.append({path for sample in samples for path in sample.paths})
        train(model, feed, samples, *rest)

    def watch_losses(model: Any, feed: Any, samples: Any, *rest: Any) -> Any:
        scored.append({path for sample in samples for path in sample.paths})
        ids.extend(sample.id for sample in samples)
        return losses(model, feed, samples, *rest)

    monkeypatch.setattr(references, "train", watch_train)
    monkeypatch.setattr(references, "_losses", watch_losses)
    step.run(settings(), inputs(small), tmp_path)
    assert here == [("large", 0), ("large", 1), ("small", 0), ("small", 1)]
    assert all(learnt and seen and not learnt & seen for learnt, seen in zip(trained, scored, strict=True))
    assert all(len(learnt | seen) == 12 for learnt, seen in zip(trained, scored, strict=True))
    assert sorted(ids) == sorted(IDS * 2)
    assert len(table(tmp_path)) == 24


def test_only_missing_references_are_made(small: Any, tmp_path: Path, here: list[Any]) -> None:
    """A step killed in its last reference must not train the first three again."""
    results(tmp_path, {"small": 0.1, "large": 0.2}, {"small": lambda i: (1.0, 1), "large": lambda i: (1.0, 1)})
    (tmp_path / "references" / "small-1.json").unlink()
    step.run(settings(), inputs(small), tmp_path)
    assert here == [("small", 1)]


def test_without_sources_the_table_is_empty(small: Any, tmp_path: Path, here: list[Any]) -> None:
    """A recipe without clips still has a video prune step; its table must be readable by the stages."""
    outcome = step.run(settings().model_copy(update={"sources": []}), {}, tmp_path)
    assert (table(tmp_path), here, outcome.values) == ({}, [], {"sources": {}})


def test_one_picture_cannot_be_scored(small: Any, tmp_path: Path, here: list[Any]) -> None:
    """With one fold empty the other would be scored by an untrained model."""
    import pyarrow.parquet as parquet

    from nvila.components.data.samples import write_samples

    rows = parquet.read_table(small.samples.path("samples.parquet")).to_pylist()
    write_samples(tmp_path / "samples.parquet", [row for row in rows if row["media"] == ["sft-0.png"]])
    alone = small.samples.model_copy(update={"folder": str(tmp_path), "files": describe_files(tmp_path)})
    with pytest.raises(DataError, match="all fall into one fold"):
        step.run(settings(), {"samples": alone, "base": small.model}, tmp_path)


def test_questions_on_one_picture_share_a_fold() -> None:
    """A picture in both folds is trained on and scored by the same reference."""
    from nvila.components.data.samples import Sample
    from nvila.components.prune.references import fold_of

    def fold(media: str, name: str, source: str = "s") -> int:
        return fold_of(Sample(name, source, "image", "sft", Path("/"), (media,), (), "q", "a"))

    assert all(fold(f"{n}.png", "a") == fold(f"{n}.png", "b") for n in range(50))
    assert 60 < sum(fold(f"{n}.png", "a") for n in range(200)) < 140


def test_a_reference_checkpoint_belongs_to_the_key(small: Any, tmp_path: Path) -> None:
    """Other weights at the same path are other references."""
    import shutil

    path = tmp_path / "reference"
    shutil.copytree(small.model.dir("model"), path)
    given = settings(small={"path": str(path)}).model_dump(mode="json")
    before = step.external(given)
    assert before["large"] == {} and "llm/model.safetensors" in before["small"]
    (path / "llm" / "config.json").write_text("{}")
    assert step.external(given) != before


def test_a_reference_in_a_bucket_belongs_to_the_key(small: Any, tmp_path: Path, s3: Bucket, here: list[Any]) -> None:
    """Nor does the name of a bucket say which references these are; what was read is told beside the scores."""
    folder = small.model.dir("model")
    for file in folder.rglob("*"):
        if file.is_file():
            s3.put(f"m/{file.relative_to(folder).as_posix()}", file.read_bytes())
    place = {"path": "s3://b/m"}
    given = settings(small=place, large=place)
    before = step.external(given.model_dump(mode="json"))
    made = step.run(given, {"samples": small.samples, "base": small.model}, tmp_path)
    assert made.read == before and "llm/model.safetensors" in before["small"]
    s3.put("m/config.json", s3.objects["m/config.json"].body + b" ")
    assert step.external(given.model_dump(mode="json")) != before


@pytest.fixture
def damaged(small: Any, tmp_path: Path) -> Manifest:
    """The samples with a picture of two questions gone."""
    import shutil

    import pyarrow.parquet as parquet

    from nvila.components.data.samples import write_samples

    root = tmp_path / "damaged"
    shutil.copytree(small.root, root)
    (root / "sft-3.png").unlink()
    rows = parquet.read_table(small.samples.path("samples.parquet")).to_pylist()
    write_samples(root / "tables" / "samples.parquet", [row | {"root": str(root)} for row in rows])
    files = describe_files(root / "tables", ["samples.parquet"])
    return Manifest(step="validate", key="k", kind="dataset", files=files, folder=str(root / "tables"))


def test_unusable_samples_have_no_score_and_do_not_stay(
    small: Any, tmp_path: Path, here: list[Any], damaged: Manifest
) -> None:
    """One damaged picture ended hours of scoring; with a score of 0 it would be kept before distracting samples."""
    given = {"samples": damaged, "base": small.model}
    allowed = settings().model_copy(update={"max_skipped_share": 0.1})
    outcome = step.run(allowed, given, tmp_path)
    assert sorted(table(tmp_path)) == sorted(set(IDS) - {"colours/sft/3-a", "colours/sft/3-b"})
    assert outcome.values["skipped"]["records"] == 2
    assert all("sft-3.png" in one for one in outcome.values["skipped"]["first"])
    assert outcome.values["sources"]["colours"]["n"] == 22
    with pytest.raises(DataError, match=r"2 of 24 records .*sft-3\.png"):
        step.run(settings(), given, tmp_path)


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:40]), Path.unlink])
@pytest.mark.parametrize("name", ["large-0.json", "large-0.sealed.json"])
def test_a_result_that_is_not_as_it_was_written_is_made_again(
    small: Any, tmp_path: Path, here: list[Any], name: str, damage: Callable[[Path], Any]
) -> None:
    """A torn result crashed every later attempt."""
    zero: dict[str, Callable[[str], tuple[float, int]]] = {size: lambda i: (0.0, 4) for size in ("small", "large")}
    results(tmp_path, {"small": 0.25, "large": 0.5}, zero)
    damage(tmp_path / "references" / name)
    step.run(settings(), inputs(small), tmp_path)
    assert here == [("large", 0)]


POOL = """
import signal, sys
from pathlib import Path
from nvila.components.contracts.errors import Preempted
from nvila.components.prune import step
import sleeper

sys.modules["nvila.components.prune.references"] = sleeper


def stop(signum, frame):
    raise Preempted("asked to stop")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    step._make([Path(sys.argv[1], name) for name in ("a", "b", "c", "d")])
"""
SLEEPER = "import os, time\ndef work(path):\n    path.write_text(str(os.getpid()))\n    time.sleep(120)\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_step_leaves_no_reference_behind(tmp_path: Path, number: signal.Signals) -> None:
    """A step that waits minutes for its references is killed before it ends; orphans take the cores of the next."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "pool.py").write_text(POOL)
    variables = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, tmp_path / "pool.py", tmp_path], env=variables, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (pids := [path.read_text() for path in tmp_path.glob("?")]) or not all(pids):  # some may be starting
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)  # ends when the last process that holds the pipe has ended
    assert (b"asked to stop" in errors) == (number == signal.SIGTERM)
    while any(Path("/proc", pid).exists() for pid in pids):
        assert time.monotonic() < deadline, "a reference lives on"
        time.sleep(0.05)
