"""What preflight says of data that are too few: the stages' batches and the gates' questions."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.contracts.recipe.recipe import slices
from nvila.components.contracts.steps import PREFLIGHT
from nvila.components.data.mixture import kept
from nvila.components.metrics.accuracy import fall, fall_without_loss
from nvila.components.preflight import step
from nvila.components.preflight.enough import Held
from nvila.components.prune.groups import Grouping

ANSWERS = ("red", "green", "blue", "grey")


def records(number: int) -> list[dict[str, Any]]:
    """Questions that say the same four things."""
    return [
        {
            "id": i,
            "image": f"{i}.png",
            "conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": ANSWERS[i % 4]}],
        }
        for i in range(number)
    ]


@pytest.fixture
def plates(tmp_path: Path) -> dict[str, Any]:
    """A recipe over 48 pictures to train on and 12 to ask about."""
    for name, number in (("sft", 48), ("heldout", 12)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records(number)))
    stages = {f"train-{number}": {"data": {"plates.sft": 1}} for number in (1, 2, 3, 4, 5)}
    return {
        "extends": "tiny",
        "name": "mine",
        "data": {"sources": [{"name": "plates", "kind": "image", "path": str(tmp_path)}]},
        "train": {"stages": stages},
        "evaluate": {"sources": ["plates"], "gate": {"min_accuracy": {"plates": 0.5}}},
        "rollout": {"target": "none"},
        "needs": {"memory_bytes": 1, "disk_bytes": 1},
    }


def problems(recipe: dict[str, Any], tmp_path: Path, **overrides: Any) -> list[str]:
    """As `nvila run` and `nvila plan` are told of them."""
    form = Form(recipe=json.dumps(recipe), overrides=overrides)
    settings = step.Settings.model_validate(slices(fill_in(form))[PREFLIGHT])
    found = step.problems(settings, tmp_path / "runs", tmp_path / "store")
    return [one for one in found if "packages" not in one and "serv" not in one]


def test_everything_that_is_too_little_is_told_at_once_and_the_advice_helps(
    plates: dict[str, Any], tmp_path: Path
) -> None:
    """A user found each of these out by a failed run: three stages, a gate, and another gate after all of them."""
    found = problems(plates, tmp_path)
    assert [one.partition(" ")[0] for one in found] == [*(f"train-{n}" for n in (1, 2, 3, 4, 5)), "data"]
    assert "train-1 (projector initialisation) draws 48 samples at most (1 x 48 of plates.sft)" in found[0]
    assert "draws 24 samples at most (1 x 24 of plates.sft after pruning)" in found[3]
    assert "12 held-out questions are too few, 30 are asked for; bring 18 more, or lower" in found[5]
    lowered: dict[str, Any] = {"train": {"stages": {}}}
    for number, one in enumerate(found[:5], 1):
        (batch,) = re.findall(rf"lower train.stages.train-{number}.batch to at most (\d+)", one)
        lowered["train"]["stages"][f"train-{number}"] = {"batch": int(batch)}
    (loss,) = re.findall(r"raise quantize.gate.max_loss to (0.\d+)", found[5])
    assert "evaluate.gate.least_questions and quantize.gate.least_questions to 12" in found[5]
    lowered["evaluate"] = {"gate": {"least_questions": 12}}
    lowered["quantize"] = {"gate": {"least_questions": 12, "max_loss": float(loss)}}
    assert problems(plates, tmp_path, **lowered) == []
    assert sum(fall([1.0] * 12, [1.0] * 12)) <= float(loss) < sum(fall([1.0] * 12, [1.0] * 12)) + 0.01
    more = {"stages": {f"train-{number}": {"data": {"plates.sft": 3}} for number in (1, 2, 3, 4, 5)}}
    assert len(problems(plates, tmp_path, **lowered | {"train": more})) == 0


def test_a_batch_that_processes_share_is_lowered_to_one_that_they_can(plates: dict[str, Any], tmp_path: Path) -> None:
    """Advice that the next refusal contradicts: batch 24 cannot be shared by 5 processes."""
    found = problems(plates, tmp_path, train={"gpus": 5, "stages": {f"train-{n}": {"batch": 65} for n in range(1, 6)}})
    assert "train-4.batch to at most 20" in found[3]


@pytest.mark.parametrize("within", [[], ["answer"], ["question", "answer-kind"], ["field:topic", "answer"]])
def test_pruning_never_leaves_more_than_was_counted_with(within: list[str]) -> None:
    """A refusal of what would have run is worse than none: the ratio is rounded up in every group."""
    draw = random.Random(str(within))
    topics = [{"topic": f"{draw.randrange(3)}"} if draw.random() < 0.8 else {} for _ in range(90)]
    said = [(f"Which {draw.choice('abcdefghijkl')}?", f"{draw.randrange(6)}") for _ in topics]
    turns = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in said]
    held = Held.of([{"id": i, "conversations": turns[i], **topic} for i, topic in enumerate(topics)])
    table = pyarrow.table(
        {
            "source": ["plates"] * len(said),
            "question": [question for question, _ in said],
            "answer": [answer for _, answer in said],
            "fields": [json.dumps(topic) for topic in topics],
        }
    )
    for ratio in (0.1, 0.34, 0.5):
        prune = PruneSettings(method="random", keep_ratio=ratio, within=within)
        groups, _ = Grouping.fit(lambda: [table], prune, 0).of(table)
        left = sum(kept(ratio, number) for number in Counter(groups).values())
        assert left <= held.kept(prune, "plates") <= held.records
        assert within or held.kept(prune, "plates") == left


def test_references_that_prove_nothing_leave_everything(plates: dict[str, Any], tmp_path: Path) -> None:
    """DeltaLoss keeps kinds of questions whole in which its references are not believed: few data are such."""
    prune = {"method": "deltaloss", "within": [], "question_clusters": 8}
    stages = {f"train-{number}": {"batch": 48} for number in (1, 2, 3, 4, 5)}
    assert not any(one.startswith("train") for one in problems(plates, tmp_path, prune=prune, train={"stages": stages}))


def test_questions_that_tell_too_little_of_a_loss_are_remarked(plates: dict[str, Any], tmp_path: Path) -> None:
    """The second gate refuses even a model that loses nothing, after everything has been trained."""
    (tmp_path / "heldout.json").write_text(json.dumps(records(60)))
    settings = step.Settings.model_validate(slices(fill_in(Form(recipe=json.dumps(plates))))[PREFLIGHT])
    (remark,) = step.remarks(settings)
    (least,) = re.findall(r"ask (\d+)$", remark)
    assert "quantize.gate.max_loss to 0.09" in remark
    assert fall_without_loss(int(least)) <= 0.03 < fall_without_loss(int(least) - 1)
    (tmp_path / "heldout.json").write_text(json.dumps(records(int(least))))
    assert step.remarks(settings) == []


def test_odd_records_count_for_nothing() -> None:
    """What is in quarantine for certain fills no batch."""
    assert Held.of([{"id": 1}, 7, None, "x"]).records == 1
