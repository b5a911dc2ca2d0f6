"""The evaluation end to end on a tiny random model, and the baselines it stands beside."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import DamagedError, DataError
from nvila.components.contracts.manifest import InputRef, Manifest, describe_files
from nvila.components.contracts.results.accuracy import Evaluation, QuantizedEvaluation
from nvila.components.contracts.results.result import Measured
from nvila.components.evaluate import step
from nvila.components.evaluate_quantized import step as quantized
from nvila.components.metrics.accuracy import is_correct, measured

TASKS = {"sources": ["colours", "clips"], "limit": None, "stage_limit": 3, "batch": 4, "max_new_tokens": 3}


def settings(**tasks: Any) -> step.Settings:
    return step.Settings.model_validate({"evaluate": TASKS | tasks, "seed": 0})


NAMES = ["initialize", "train-1", "train-2"]


def inputs(small: Any, store: Path) -> dict[str, Manifest]:
    """The same model as the output of three steps, each of which has read the one before."""
    last = small.model
    for name in NAMES:
        ref = InputRef(step=last.step, uri=f"/elsewhere/{last.step}/k/manifest.json", digest=last.digest)
        folder = shutil.copytree(small.model.folder, store / name / "k", dirs_exist_ok=True)
        read = {"model": ref} if name != NAMES[0] else {}
        last = small.model.model_copy(update={"step": name, "key": "k", "folder": str(folder), "inputs": read})
        last.save(folder / "manifest.json")
    return {"samples": small.samples, "model": last}


@pytest.fixture(scope="module")
def evaluated(small: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Manifest]:
    """Values of the step, and a manifest of its files."""
    out = tmp_path_factory.mktemp("evaluate")
    outcome = step.run(settings(), inputs(small, out.parent / "store"), out)
    files = describe_files(out, outcome.files)
    assert sorted(files) == ["predictions.parquet", "stages.png"]
    manifest = Manifest(step="evaluate", key="k", kind="metrics", files=files, result=outcome.result)
    assert isinstance(outcome.result, Evaluation)
    return outcome.result, manifest.model_copy(update={"folder": str(out)})


def rows_of(manifest: Manifest) -> list[dict[str, Any]]:
    import pyarrow.parquet as parquet

    return list(parquet.read_table(manifest.path("predictions.parquet")).to_pylist())


def test_each_question_has_its_row(evaluated: tuple[Evaluation, Manifest], small: Any) -> None:
    """The report, the quantized comparison and the pinned prompts read these columns."""
    rows = rows_of(evaluated[1])
    shown = ["prediction", "prediction_blank", "prediction_other", "correct", "root", "media"]
    assert all(list(row) == ["id", "source", "question", "answer", *shown] for row in rows)
    wanted = [f"colours/heldout/{n}-{q}" for n in range(8) for q in "ab"] + [f"clips/heldout/{n}" for n in range(4)]
    assert sorted(row["id"] for row in rows) == sorted(wanted)
    assert all(row["correct"] == is_correct(row["prediction"], row["answer"]) for row in rows)
    assert all(Path(row["root"], name).exists() for row in rows for name in row["media"])


def test_accuracy_stands_beside_its_baselines(evaluated: tuple[Evaluation, Manifest]) -> None:
    """An accuracy without interval and baselines says nothing of whether the model looks at the picture."""
    told, manifest = evaluated
    assert list(told.accuracy) == ["colours", "clips"]
    for source, found in told.accuracy.items():
        rows = [row for row in rows_of(manifest) if row["source"] == source]
        own = measured("accuracy", [row["correct"] for row in rows])
        assert Measured(**found.model_dump(include=set(Measured.model_fields))) == own
        assert 0.0 <= found.low <= found.value <= found.high <= 1.0
        assert set(found.baselines) == {"question text", "blank picture", "other picture"}
        for kind, column in (("blank picture", "prediction_blank"), ("other picture", "prediction_other")):
            assert found.baselines[kind] == measured(
                "accuracy", [is_correct(row[column], row["answer"]) for row in rows]
            )
        strongest = max(found.baselines.values(), key=lambda baseline: baseline.value)
        assert found.question_only.value == strongest.value
        assert found.baselines[found.question_only.kind].high == found.question_only.high


def test_question_text_baselines_are_those_of_the_training_answers(
    evaluated: tuple[Evaluation, Manifest],
) -> None:
    """Counted by hand: of 12 training pictures 3 are red, so `no` is right for "Is it red?" of 6 in 8 held-out ones.

    The colour question has four equally common answers: 2 of 8. Over all questions `no` is the most common answer.
    """
    found = evaluated[0].accuracy["colours"]
    assert found.baselines["question text"].value == (6 + 2) / 16
    assert found.majority.value == 6 / 16


def test_every_stage_is_measured_on_the_same_first_questions(evaluated: tuple[Evaluation, Manifest]) -> None:
    """Stages measured on different questions cannot be compared; here all three are one model, and must be equal."""
    told, manifest = evaluated
    assert list(told.stages) == NAMES
    for source in TASKS["sources"]:  # type: ignore[attr-defined]
        first = [row["correct"] for row in rows_of(manifest) if row["source"] == source][:3]
        assert all(stage[source] == measured("accuracy", first) for stage in told.stages.values())


def test_an_earlier_stage_that_was_replaced_is_found_out(small: Any, tmp_path: Path) -> None:
    """The table of stages would show a model that this one never came from."""
    given = inputs(small, tmp_path / "store")
    other = given["model"].origin("model").model_copy(update={"kind": "metrics"})
    other.save(tmp_path / "store" / other.step / "k" / "manifest.json")
    with pytest.raises(DamagedError, match="not the output of step train-1 that train-2 read"):
        step.run(settings(), given, tmp_path)


def test_the_same_work_gives_the_same_result(
    evaluated: tuple[Evaluation, Manifest], small: Any, tmp_path: Path
) -> None:
    """Values with a time or a path of the run make every later step a new piece of work."""
    outcome = step.run(settings(), inputs(small, tmp_path / "store"), tmp_path)
    assert outcome.result == evaluated[0]
    assert rows_of(evaluated[1].model_copy(update={"folder": str(tmp_path)})) == rows_of(evaluated[1])


def test_a_source_without_held_out_questions_is_the_users_error(small: Any, tmp_path: Path) -> None:
    """An accuracy of nothing would pass or fail the gate by accident."""
    with pytest.raises(DataError, match="source nowhere has no held-out questions"):
        step.run(settings(sources=["nowhere"]), inputs(small, tmp_path / "store"), tmp_path)


def test_the_choice_of_questions_depends_on_the_seed_only(small: Any) -> None:
    """A limit that takes the first of a sorted file measures one corner of the data."""
    table, tasks = small.samples.path("samples.parquet"), settings(limit=6).evaluate
    chosen = [[sample.id for sample in step.heldout(table, "colours", tasks, seed)] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 6
    assert chosen[0] != sorted(chosen[0])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The quantized model answers what this says for the question's id, else right."""
    lies: dict[str, str] = {}

    def answer(model: Path, samples: list[Any], settings: Any, out: Path) -> list[str]:
        return [lies.get(sample.id, sample.answer) for sample in samples]

    monkeypatch.setattr(quantized, "_through_torch", answer)
    return lies


@pytest.mark.parametrize("limit", [None, 2])
def test_the_quantized_model_is_compared_question_by_question(
    evaluated: tuple[Evaluation, Manifest], small: Any, tmp_path: Path, asked: dict[str, str], limit: int | None
) -> None:
    """Answers paired with other questions turn a perfect model into a broken one, or hide a broken one."""
    full = rows_of(evaluated[1])
    wrong = next(row["id"] for row in full if row["source"] == "colours")
    asked[wrong] = "nonsense"
    given = quantized.Settings.model_validate({"evaluate": TASKS, "limit": limit, "through_vllm": False})
    manifests = {"samples": small.samples, "metrics": evaluated[1], "model": small.model}
    outcome = quantized.run(given, manifests, tmp_path)
    made = {"folder": str(tmp_path), "files": describe_files(tmp_path, outcome.files)}
    rows = rows_of(evaluated[1].model_copy(update=made))
    kept = [row for source in ("colours", "clips") for row in [r for r in full if r["source"] == source][:limit]]
    assert [row["id"] for row in rows] == [row["id"] for row in kept]
    assert [row["prediction_full"] for row in rows] == [row["prediction"] for row in kept]
    assert {row["id"] for row in rows if not row["correct"]} == {wrong}
    assert isinstance(outcome.result, QuantizedEvaluation)
    found = outcome.result.accuracy["colours"]
    count = sum(row["source"] == "colours" for row in rows)
    before = [row["correct"] for row in kept if row["source"] == "colours"]
    assert found.value == pytest.approx(1 - 1 / count, abs=1e-4) and found.full == measured("accuracy", before)
    assert found.fall == pytest.approx(sum(before) / count - found.value, abs=1e-3)
    assert found.fall_noise > 0
    assert outcome.files == ("predictions.parquet",)
