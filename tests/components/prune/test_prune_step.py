"""DeltaLoss: the arithmetic, the folds, and references that are made once and leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from buckets import Bucket

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import DataError, NvilaError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.results.model import Pruning
from nvila.components.prune import judge, step, work

TINY: dict[str, Any] = {
    "decoder": {"hidden": 16, "layers": 1, "heads": 1, "kv_heads": 1, "mlp": 32},
    "epochs": 1,
    "batch": 16,
}
HERE = Environment()
IDS = [f"colours/sft/{n}-{q}" for n in range(12) for q in "ab"]


def settings(sources: list[str] | None = None, **prune: Any) -> step.Settings:
    prune = {"small": TINY, "large": TINY} | prune
    return step.Settings.model_validate(
        {"prune": prune, "sources": ["colours"] if sources is None else sources, "seed": 0, "max_skipped_share": 0.01}
    )


def inputs(small: Any) -> dict[str, Manifest]:
    return {"samples": small.samples, "model": small.model}


def table(out: Path) -> dict[str, dict[str, Any]]:
    import pyarrow.parquet as parquet

    return {row["id"]: row for row in parquet.read_table(out / "scores.parquet").to_pylist()}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The work is done in this process, and few questions are enough; the list gets the names of the tasks."""
    done: list[str] = []
    monkeypatch.setattr(judge, "LEAST_QUESTIONS", 2)

    def crew(tasks: list[Any], ranks: int) -> list[Any]:
        found = []
        for task in tasks:
            found.append(task())
            done.append(task.func.__name__)
        return found

    monkeypatch.setattr(work, "crew", crew)
    monkeypatch.setattr(work, "ranks_here", lambda gpus: 2)
    work._panels.cache_clear()
    return done


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """References of random weights are believed, so that they are asked."""
    monkeypatch.setattr(step, "believed", lambda judged, method: set(judged))


@pytest.mark.parametrize("score", ["sum", "mean"])
def test_delta_is_the_small_loss_minus_the_large_one(
    small: Any, tmp_path: Path, here: list[str], trusted: None, score: str
) -> None:
    """The wrong sign keeps exactly the distracting samples; the wrong length norm keeps long answers or short ones."""
    outcome = step.run(
        settings(score=score, keep_ratio=0.25, small=TINY | {"batch": 4}, large=TINY | {"batch": 4, "epochs": 2}),
        inputs(small),
        tmp_path,
        HERE,
    )
    rows = table(tmp_path)
    assert sorted(rows) == sorted(IDS)
    for row in rows.values():
        assert row["delta_sum"] == row["loss_small"] - row["loss_large"]
        assert row["delta_mean"] == pytest.approx(row["delta_sum"] / row["tokens_small"])
        assert row["tokens_small"] == row["tokens_large"] > 0
        assert row["score"] == row[f"delta_{score}"]
    kept, dropped = ([row["score"] for row in rows.values() if row["kept"] is fate] for fate in (True, False))
    assert len(kept) == 6 and min(kept) >= max(dropped) and len(set(kept + dropped)) > 12
    found = outcome.result.groups["colours"]
    assert (found.n, found.kept, found.ranked_by, found.source) == (24, 6, "deltaloss", "colours")
    assert outcome.result.sources["colours"].kept == 6


def test_what_is_not_believed_is_not_scored(small: Any, tmp_path: Path, here: list[str]) -> None:
    """Two references of random weights are equally blind: their DeltaLoss threw away half of the data by chance, after
    all of it had been scored."""
    outcome = step.run(settings(), inputs(small), tmp_path, HERE)
    assert here.count("train") == 4 and "answer" in here and "score" not in here
    rows = table(tmp_path)
    assert all(row["kept"] and row["loss_large"] is None and row["category"] is None for row in rows.values())
    assert not any(told.trusted for told in outcome.result.judged.values())
    assert all(told.why for told in outcome.result.judged.values())
    assert {group.ranked_by for group in outcome.result.groups.values()} == {"none"}


def test_references_that_no_question_can_prove_are_not_made(
    small: Any, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With hardly a held-out question of any kind, references were trained for a verdict that was known before."""
    monkeypatch.setattr(judge, "LEAST_QUESTIONS", 1000)
    outcome = step.run(settings(), inputs(small), tmp_path, HERE)
    assert here == [] and all(row["kept"] for row in table(tmp_path).values())
    assert all("held-out questions" in told.why for told in outcome.result.judged.values())


@pytest.mark.parametrize("method", ["random", "clusters", "none"])
def test_nothing_to_prune_is_said(small: Any, tmp_path: Path, here: list[str], method: str) -> None:
    """A source without SFT samples ended the step with an error of NumPy."""
    with pytest.raises(DataError, match="no SFT sample of nothing to prune"):
        step.run(settings(["nothing"], method=method), inputs(small), tmp_path, HERE)


@pytest.mark.parametrize(
    ("method", "tasks"), [("random", []), ("clusters", ["centres", "score", "score"]), ("none", [])]
)
def test_other_methods_train_nothing(
    small: Any, tmp_path: Path, here: list[str], method: str, tasks: list[str]
) -> None:
    """The baselines are to cost what they cost: no reference is made for them."""
    outcome = step.run(settings(["clips", "colours"], method=method), inputs(small), tmp_path, HERE)
    rows = table(tmp_path)
    assert sum(row["kept"] for row in rows.values()) == (32 if method == "none" else 16)
    assert here[: len(tasks)] == tasks[: len(here)] and outcome.result.judged == {}
    assert all((row["cluster"] is not None) == (method == "clusters") for row in rows.values())


def test_no_reference_scores_a_picture_it_was_trained_on(
    small: Any, tmp_path: Path, here: list[str], trusted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model scores what it learnt by heart as easy: pruning would then follow the folds, not the data."""
    from nvila.components.prune import references
    from nvila.components.prune.scoring import Panel

    learnt: dict[int, set[Path]] = {}
    seen: list[set[Path]] = []
    order, score = references._order, Panel.score

    def watch_order(reference: Any, fold: int, job: Any) -> Any:
        samples = order(reference, fold, job)
        learnt.setdefault(fold, set()).update(path for sample in samples for path in sample.paths)
        return samples

    def watch_score(panel: Any, samples: Any, blind: Any = None) -> Any:
        samples = list(samples)
        seen.append({path for sample in samples if sample.split == "sft" for path in sample.paths})
        return score(panel, samples, blind)

    monkeypatch.setattr(references, "_order", watch_order)
    monkeypatch.setattr(Panel, "score", watch_score)
    step.run(settings(), inputs(small), tmp_path, HERE)
    scored = [paths for paths in seen if paths]
    assert len(scored) == 2 and all(learnt[fold] for fold in (0, 1))
    assert not learnt[0] & scored[0] and not learnt[1] & scored[1]
    assert len(scored[0] | scored[1]) == 12 and not scored[0] & scored[1]


def test_captions_of_a_picture_stay_in_its_fold(small: Any, tmp_path: Path) -> None:
    """A reference that has read a picture's caption has seen it, whatever it is asked."""
    from nvila.components.prune.references import _order, fold_of

    given = settings(large=TINY | {"caption_epochs": 1})
    job = work.Job(
        prune=given.prune,
        sources=["colours"],
        seed=0,
        max_skipped_share=0,
        samples=small.samples.path("samples.parquet"),
        base=small.model.dir("model"),
        weights={},
        clusters=False,
        folder=tmp_path,
    )
    samples = _order(given.prune.large, 0, job)
    assert {sample.split for sample in samples} == {"captions", "sft"}
    assert [sample.split for sample in samples] == sorted(sample.split for sample in samples)
    assert all(fold_of(sample) == 1 for sample in samples)


@pytest.mark.parametrize(
    ("lost", "made"),
    [
        ("references/large-0.sealed.json", ["large-0"]),
        ("references/small-1/llm/model.safetensors", ["small-1"]),
        ("shards/000000.json", []),
        ("heldout/0-*.sealed", []),
    ],
)
def test_only_what_is_missing_is_made_again(
    small: Any,
    tmp_path: Path,
    here: list[str],
    trusted: None,
    monkeypatch: pytest.MonkeyPatch,
    lost: str,
    made: list[str],
) -> None:
    """A step killed in its last piece of work must not train references again; a torn piece crashed later attempts."""
    from nvila.components.prune import references

    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the pieces stay
    first = step.run(settings(), inputs(small), tmp_path, HERE)
    place = min((tmp_path / step.PIECES).glob(lost))
    place.write_bytes(place.read_bytes()[:40])
    trained: list[str] = []
    train = references._train

    def watch(name: str, reference: Any, model: Any, lesson: Any, fold: int, job: Any) -> None:
        trained.append(f"{name}-{fold}")
        train(name, reference, model, lesson, fold, job)

    monkeypatch.setattr(references, "_train", watch)
    work._panels.cache_clear()
    again = step.run(settings(), inputs(small), tmp_path, HERE)
    assert trained == made and again.result == first.result


def test_an_attempt_on_fewer_cores_judges_by_all_questions(
    small: Any, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of the held-out questions were known by their number: an attempt with fewer processes took the first
    pieces of the one before for all there was, and judged references by a part of the questions."""
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the pieces stay
    found = []
    for ranks in (4, 1):
        monkeypatch.setattr(work, "ranks_here", lambda ranks=ranks: ranks)
        result = step.run(settings(), inputs(small), tmp_path, HERE).result
        assert isinstance(result, Pruning)
        found.append({kind: judged.n for kind, judged in result.judged.items()})
    assert found[0] == found[1] and sum(found[0].values()) > 1


def test_clusters_are_made_once(small: Any, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that went on made the clusters anew: on another machine their numbers were others than those in the
    shards that were there."""
    from nvila.components.prune import clusters

    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the pieces stay
    asked = settings(["clips", "colours"], method="clusters", vision_clusters=2)
    first = step.run(asked, inputs(small), tmp_path, HERE)
    rows = table(tmp_path)
    fit = clusters.fit
    monkeypatch.setattr(clusters, "fit", lambda features, k, seed: fit(features, k, seed)[::-1])
    (tmp_path / step.PIECES / "shards" / "000000.sealed").unlink()
    assert step.run(asked, inputs(small), tmp_path, HERE).result == first.result and table(tmp_path) == rows


def test_a_conversation_is_judged_by_its_first_question(tmp_path: Path) -> None:
    """The losses of all its answers stood against the commonest answers to the first question alone: no reference was
    ever believed in a source of long conversations."""
    from types import SimpleNamespace

    from nvila.components.data.samples import write_samples
    from nvila.components.prune.groups import Grouping
    from nvila.components.prune.heldout import questions

    turns = [{"from": role, "value": f"{role} {n}"} for n in range(3) for role in ("human", "gpt")]
    row = {"id": "s/heldout/0", "source": "s", "kind": "image", "split": "heldout", "root": str(tmp_path)}
    row |= {"media": ["a.png"], "conversations": json.dumps(turns), "question": "human 0", "answer": "gpt 0"}
    write_samples(tmp_path / "samples.parquet", [row])
    job: Any = SimpleNamespace(samples=tmp_path / "samples.parquet", prune=settings().prune, sources=["s"])
    (((asked,),),) = (questions(job, Grouping([])).values(),)
    assert [turn.text for turn in asked.conversations] == ["human 0", "gpt 0"]


def test_without_sources_the_table_is_empty(small: Any, tmp_path: Path, here: list[str]) -> None:
    """A recipe without clips still has a video prune step; its table must be readable by the stages."""
    outcome = step.run(settings().model_copy(update={"sources": []}), {}, tmp_path, HERE)
    assert (table(tmp_path), here, outcome.result) == ({}, [], Pruning(sources={}, method="deltaloss"))


def test_one_picture_cannot_be_scored(small: Any, tmp_path: Path, here: list[str]) -> None:
    """With one fold empty the other would be scored by an untrained model."""
    import pyarrow.parquet as parquet

    from nvila.components.data.samples import write_samples

    rows = parquet.read_table(small.samples.path("samples.parquet")).to_pylist()
    write_samples(
        tmp_path / "samples.parquet",
        [row for row in rows if row["split"] == "heldout" or row["media"] == ["sft-0.png"]],
    )
    alone = small.samples.model_copy(update={"folder": str(tmp_path), "files": describe_files(tmp_path)})
    with pytest.raises(DataError, match="all fall into one fold"):
        step.run(settings(), {"samples": alone, "model": small.model}, tmp_path, HERE)


def test_questions_on_one_picture_share_a_fold() -> None:
    """A picture in both folds is trained on and scored by the same reference."""
    from nvila.components.data.samples import Sample
    from nvila.components.prune.references import fold_of

    def fold(media: str, name: str, source: str = "s", root: str = "/", digest: str | None = None) -> int:
        digests = () if digest is None else (digest,)
        return fold_of(Sample(name, source, "image", "sft", Path(root), (media,), (), "q", "a", media_sha256=digests))

    assert all(fold(f"{n}.png", "a") == fold(f"{n}.png", "b", "t") for n in range(50))
    assert 60 < sum(fold(f"{n}.png", "a") for n in range(200)) < 140
    for n in range(50):
        digest = sha256(str(n).encode()).hexdigest()
        assert fold(f"{n}.png", "a", digest=digest) == fold("copy.png", "b", "t", "/elsewhere", digest)


def test_a_reference_checkpoint_belongs_to_the_key(small: Any, tmp_path: Path) -> None:
    """Other weights at the same path are other references."""
    path = tmp_path / "reference"
    shutil.copytree(small.model.dir("model"), path)
    given = settings(small={"path": str(path)}).model_dump(mode="json")
    before = step.external(given, HERE)
    assert before["large"] == {} and "llm/model.safetensors" in before["small"]
    (path / "llm" / "config.json").write_text("{}")
    assert step.external(given, HERE) != before


def test_a_reference_in_a_bucket_belongs_to_the_key(small: Any, tmp_path: Path, s3: Bucket, here: list[str]) -> None:
    """Nor does the name of a bucket say which references these are; what was read is told beside the scores."""
    folder = small.model.dir("model")
    for file in folder.rglob("*"):
        if file.is_file():
            s3.put(f"m/{file.relative_to(folder).as_posix()}", file.read_bytes())
    place = {"path": "s3://b/m"}
    given = settings(small=place, large=place)
    before = step.external(given.model_dump(mode="json"), HERE)
    made = step.run(given, {"samples": small.samples, "model": small.model}, tmp_path, HERE)
    assert made.read == before and "llm/model.safetensors" in before["small"]
    s3.put("m/config.json", s3.objects["m/config.json"].body + b" ")
    assert step.external(given.model_dump(mode="json"), HERE) != before


@pytest.fixture
def damaged(small: Any, tmp_path: Path) -> Manifest:
    """The samples with a picture of two questions gone."""
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
    small: Any, tmp_path: Path, here: list[str], trusted: None, damaged: Manifest
) -> None:
    """One damaged picture ended hours of scoring; with a score of 0 it would be kept before distracting samples."""
    given = {"samples": damaged, "model": small.model}
    allowed = settings(keep_ratio=1.0).model_copy(update={"max_skipped_share": 0.2})
    outcome = step.run(allowed, given, tmp_path, HERE)
    rows = table(tmp_path)
    assert sorted(one for one in IDS if not rows[one]["kept"]) == ["colours/sft/3-a", "colours/sft/3-b"]
    assert outcome.result.skipped.records == 2
    assert all("sft-3.png" in one for one in outcome.result.skipped.first)
    with pytest.raises(DataError, match=r"records .*sft-3\.png"):
        step.run(settings(), given, tmp_path / "again", HERE)


POOL = """
import signal, sys
from pathlib import Path
from nvila.components.contracts.errors import Preempted
from functools import partial
from nvila.components.prune import work
import sleeper


def stop(signum, frame):
    raise Preempted("asked to stop")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    work.crew([partial(sleeper.work, Path(sys.argv[1], name)) for name in ("a", "b", "c", "d")], 2)
"""
KILLED = "import os, signal\ndef work(path):\n    os.kill(os.getpid(), signal.SIGKILL)\n"


def test_a_process_that_the_kernel_killed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "A process in the process pool was terminated abruptly" names neither the signal nor who sends it."""
    (tmp_path / "shot.py").write_text(KILLED)
    monkeypatch.syspath_prepend(str(tmp_path))
    import shot  # type: ignore[import-not-found]

    with pytest.raises(NvilaError, match=r"a process of pruning was killed by signal 9 \(SIGKILL\), often .* memory"):
        work.crew([partial(shot.work, tmp_path)] * 4, 2)


SLEEPER = "import os, time\ndef work(path):\n    path.write_text(str(os.getpid()))\n    time.sleep(120)\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_step_leaves_no_reference_behind(tmp_path: Path, number: signal.Signals) -> None:
    """A step that waits minutes for its references is killed before it ends; orphans take the cores of the next."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "pool.py").write_text(POOL)
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
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
