"""What pruning costs and saves, and whether that is said before it is spent."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.gpus import GPUS
from nvila.components.contracts.manifest import MANIFEST, Manifest
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.results.model import Training
from nvila.components.contracts.results.result import SkippedRecords
from nvila.components.data.layouts import read
from nvila.components.model.shape import Shape
from nvila.components.model.work import forward, operations
from nvila.components.prune import references
from nvila.components.runner.work import machine
from nvila.pipelines.planning import cost, pruning, speed
from nvila.pipelines.planning.cost import Subset
from nvila.pipelines.planning.pruning import Effort, PrunePlan, Rates, plans
from nvila.pipelines.planning.shape import shape_at, shape_of
from nvila.pipelines.planning.speed import Speed, speed_here

KNOWN = {
    name: Subset(1000, 20, kind)
    for name, kind in (
        ("shapes.sft", "image"),
        ("digits.sft", "image"),
        ("clips.sft", "video"),
        ("shapes.captions", "image"),
        ("digits.captions", "image"),
        ("clips.captions", "video"),
    )
}
RATES = Rates(GPUS["h100"], 0.5, 2.0, Speed(1e9, "told"))
TRAINED = {"small": {"epochs": 2}, "large": {"epochs": 2}}


def recipe(**prune: Any) -> Recipe:
    """`micro` with stage 4 alone pruned, of the shapes, and this section."""
    stages = {"train-4": {"data": {"shapes.sft": 1}}, "train-5": {"pruned": None}}
    layer = {"prune": {"small": None, "large": None} | prune, "train": {"stages": stages}}
    return fill_in(Form(recipe="micro", overrides=layer))


def minutes(known: Mapping[str, Subset] = KNOWN, **prune: Any) -> tuple[float, float]:
    """Costs and savings of all steps."""
    total = plans(recipe(**prune), known, RATES)[0][-1]
    assert total.costs and total.costs.minutes_here is not None
    assert total.saves and total.saves.minutes_here is not None
    return total.costs.minutes_here, total.saves.minutes_here


def _minutes(work: float) -> float:
    return work / 1e9 / 60


def _shape(of: Recipe) -> Shape:
    shape = shape_of(of.model)
    assert shape
    return shape


def test_chance_costs_nothing_and_saves_what_goes() -> None:
    """The least that any other method has to be better than."""
    costs, saves = minutes(method="random", keep_ratio=0.3)
    whole, stage = _shape(recipe(method="random")), recipe(method="random").train.stages[3]
    assert stage
    one = operations(whole, stage, whole.image.load(20, whole.config.max_length_tokens))
    assert costs == 0 and saves == pytest.approx(_minutes(700 * one))


def test_no_pruning_saves_nothing() -> None:
    """Stages that see all of the data would be planned with half of it."""
    off = recipe(method="none")
    total = plans(off, KNOWN, RATES)[0][-1]
    assert (total.pays, total.verdict) == (None, "all samples stay; costs nothing")
    assert off.train.stages[3] and cost.samples_of(off.train.stages[3], KNOWN, off.prune) == {"shapes.sft": 1000}


def test_a_pass_of_each_reference_is_counted() -> None:
    """Scoring is most of the cost of large references, training that of small ones."""

    def rest(shape: Shape | None) -> float:
        assert shape
        through = forward(shape, shape.image.load(20, shape.config.max_length_tokens))
        return through["mm_projector"] + through["llm"]

    shape, few = _shape(recipe()), {"heldout_questions": 1}
    tower = forward(shape, shape.image.load(20, shape.config.max_length_tokens))["vision_tower"]
    gain = minutes(method="multimodal-gain", large={"path": "as large as the model"}, **few)[0]
    assert gain == pytest.approx(_minutes(1001 * (2 * rest(shape) + tower)))
    one, two = (minutes(large={"epochs": n}, small={"epochs": 1}, **few)[0] for n in (1, 2))
    decoder = recipe(large={"epochs": 1}).prune.large.decoder
    assert two - one == pytest.approx(_minutes(1000 * 3 * rest(shape_of(recipe().model, decoder))))


def test_a_tower_that_is_shared_is_counted_once() -> None:
    """The plan would say twice of what is done once."""
    shape = _shape(recipe())
    tower = forward(shape, shape.image.load(20, 512))["vision_tower"]
    whole = plans(recipe(**TRAINED, heldout_questions=1), KNOWN, RATES)[0][0].costs
    apart = plans(recipe(small={"path": "a"}, large={"epochs": 2}, heldout_questions=1), KNOWN, RATES)[0][0].costs
    assert whole and apart and whole.gpu_hours > 0
    seen_once = KNOWN | {"shapes.sft": Subset(1000, 20, "image", looks=100)}
    fewer, more = minutes(seen_once, **TRAINED)[0], minutes(**TRAINED)[0]
    assert more - fewer == pytest.approx(_minutes(900 * tower))


def test_clusters_cost_a_look_at_each_medium() -> None:
    """Ten questions about one picture are no ten pictures."""
    shape = _shape(recipe())
    tower = forward(shape, shape.image.load(20, 512))["vision_tower"]
    seen = KNOWN | {"shapes.sft": Subset(1000, 20, "image", looks=100)}
    assert minutes(seen, method="clusters")[0] == pytest.approx(_minutes(200 * tower))


def test_each_step_is_told_of_and_all_together() -> None:
    """A recipe may prune pictures with gain and clips at a loss."""
    found, assumed = plans(fill_in(Form(recipe="micro")), KNOWN, RATES)
    image, video, total = found
    assert [one.step for one in found] == ["prune-image", "prune-video", "pruning"] and assumed == []
    assert image.samples == 2000 and video.samples == 1000 and total.samples == 3000
    assert image.costs and video.costs and total.costs == image.costs + video.costs
    assert image.saves and video.saves and total.saves == image.saves + video.saves
    assert total.sources == ["shapes", "digits", "clips"] and total.references == dict.fromkeys(
        ("small", "large"), "trained here"
    )


def test_what_is_not_known_is_not_made_up() -> None:
    """Data that are elsewhere; a reference whose sizes nothing tells is taken for the model itself, which is said."""
    found, _ = plans(recipe(**TRAINED), {}, RATES)
    assert found[-1].costs is None and found[-1].pays is None and found[-1].verdict.startswith("unknown")
    found, assumed = plans(recipe(large={"path": "s3://b/mine"}, small={"epochs": 1}), KNOWN, RATES)
    assert found[-1].costs and found[-1].references["large"] == "s3://b/mine"
    assert assumed == ["prune.large (s3://b/mine) is taken to be as large as the recipe's model"]
    lite = shape_at("hf://Efficient-Large-Model/NVILA-Lite-8B@main")
    assert lite and 7.5e9 < lite.total < 8.5e9 and shape_at("nowhere") is None


@pytest.mark.parametrize(
    ("costs", "saves", "here", "verdict"),
    [
        (1.2, 30, None, "costs 1.2 GPU hours, saves 30"),
        (0.02, 0.4, None, "costs 1.2 GPU minutes, saves 24"),
        (4.1, 2.2, 4.1, "costs more than it saves: 4.1 against 2.2 minutes"),
        (0, 2.2, 0, "costs nothing, saves 2.2 minutes"),
    ],
)
def test_the_verdict_is_in_words(costs: float, saves: float, here: float | None, verdict: str) -> None:
    """Two numbers in a table leave open which of them is better."""
    spent, spared = (Effort(value, 0, None if here is None else value) for value in (costs, saves))
    assert PrunePlan("prune-image", "deltaloss", ["a"], {}, 1, spent, spared).verdict == verdict
    nothing = PrunePlan("prune-image", "deltaloss", [], {}, 0, spent, spared)
    assert nothing.verdict == "does not run: no stage takes a part of it" and nothing.pays is None


def test_it_counts_as_the_step_works() -> None:
    """The step's constants, which heavy modules hold."""
    from nvila.components.prune import clusters, scoring

    assert pruning.FOLDS == references.FOLDS and cost.WINDOW == scoring.WINDOW
    assert pruning.FITTED_MEDIA == clusters.FITTED_MEDIA


def test_media_are_counted_where_the_data_are_here(tmp_path: Path) -> None:
    """Four questions a picture made the tower's work four times what it is."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    records = [{"image": f"{index // 4}.png", "conversations": turns} for index in range(400)]
    (tmp_path / "sft.json").write_text(json.dumps(records))
    of = fill_in(Form(recipe="micro")).data.sources[0].model_copy(update={"path": str(tmp_path)})
    data = fill_in(Form(recipe="micro")).data.model_copy(update={"sources": [of]})
    assert len(read(tmp_path / "sft.json", "llava")) == 400
    assert cost.subsets(data, {})["shapes.sft"].media == 100
    assert cost.subsets(data, {"shapes.sft": 8})["shapes.sft"].media == 8


def test_the_speed_is_that_of_the_stages_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess where a measurement lies in the store; or a measurement of another model, or of another machine."""
    of = fill_in(Form(recipe="micro"))
    shape = _shape(of)
    monkeypatch.setattr(speed, "_product", lambda threads: 1e9)
    assert speed_here(shape, KNOWN, tmp_path, "fp32").operations_a_second == speed.SHARE_REACHED * 1e9
    stage = of.train.stages[0]
    assert stage
    told = Training(
        stage=stage.model_dump(mode="json"),
        precision="fp32",
        steps=5,
        samples=1000,
        skipped=SkippedRecords(),
        final_loss=1.0,
    )
    here = machine(os.environ.get("OMP_NUM_THREADS", ""))

    def leave(name: str, on: dict[str, Any], seconds: float) -> None:
        folder = tmp_path / "train-1" / name
        folder.mkdir(parents=True)
        Manifest(step="train-1", key=name, kind="model", result=told, machine=on, seconds=seconds).save(
            folder / MANIFEST
        )

    leave("elsewhere", here | {"cpu": "another"}, 1.0)
    monkeypatch.setattr(speed, "shape_at", lambda place: shape)
    assert "matrix product" in speed_here(shape, KNOWN, tmp_path, "fp32").evidence
    leave("ours", here, 10.0)
    found = speed_here(shape, KNOWN, tmp_path, "fp32")
    each = operations(shape, stage, shape.image.load(20, shape.config.max_length_tokens))
    assert found.operations_a_second == pytest.approx(1000 * each / 10) and "train-1" in found.evidence
    assert "matrix product" in speed_here(shape, KNOWN, tmp_path, "fp8-current").evidence
    monkeypatch.setattr(speed, "shape_at", lambda place: None)
    assert "matrix product" in speed_here(shape, KNOWN, tmp_path, "fp32").evidence
