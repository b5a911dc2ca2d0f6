"""`nvila plan` as a person and as a program see it."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, PreflightError
from nvila.components.contracts.gpus import GPUS
from nvila.components.contracts.pipelines import PIPELINES
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.reader import shipped
from nvila.components.contracts.recipe.recipe import Recipe
from nvila.components.contracts.steps import ROWS
from nvila.pipelines.cli import app
from nvila.pipelines.planning import plan as planning
from nvila.pipelines.planning.checks import Need
from nvila.pipelines.planning.hits import verdicts
from nvila.pipelines.planning.memory import Memory
from nvila.pipelines.planning.plan import StagePlan, assumptions_of, parse_samples

LARGE = ("nvila-lite-2b", "--no-cluster", "--json")
SAMPLES = ("images.captions=1000000", "images.sft=400000", "videos.sft=100000")


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No cluster and no home of this machine."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.chdir(tmp_path)


def _plan(*arguments: str) -> Result:
    """In this process: each start of its own would import torch anew."""
    ended = CliRunner().invoke(app, ["plan", *arguments])
    if ended.exception and not isinstance(ended.exception, SystemExit):
        raise ended.exception
    return ended


def test_a_first_plan_needs_nothing_and_makes_nothing(tmp_path: Path) -> None:
    """A plan that builds data, or locks the store, is a run."""
    ended = _plan("micro")
    assert ended.exit_code == 0, ended.stdout
    for words in ("train-5", "h100", "fits", "optimizer    8 R", "MFU 0.3", "this machine has what it takes"):
        assert words in ended.stdout, words
    assert "no cluster is configured" in ended.stdout and "unknown: the annotation files are not here" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def _plates(folder: Path, lost: int, of: int) -> str:
    """A recipe over a source of its own, some of whose pictures are gone."""
    (folder / "plates").mkdir()
    for name, numbers in (("sft", range(of)), ("heldout", range(100, 104))):
        records = [
            {
                "id": str(number),
                "image": f"{number}.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nPlate?"},
                    {"from": "gpt", "value": f"AB {number}"},
                ],
            }
            for number in numbers
        ]
        (folder / f"plates/{name}.json").write_text(json.dumps(records))
        for number in list(numbers)[lost if name == "sft" else 0 :]:
            Image.new("RGB", (16, 16), (number, 2 * number, 9)).save(folder / f"plates/{number}.png")
    sources = "data: {sources: [{name: plates, kind: image, path: plates}]}"
    left_out = ", ".join(f"train-{number}: null" for number in range(1, 5))
    stages = f"train: {{stages: {{{left_out}, train-5: {{data: {{plates.sft: 1}}, batch: 4}}}}}}"
    rest = "evaluate: {sources: [plates], gate: {min_accuracy: {plates: 0.1}, least_questions: 4}}\n"
    rest += "quantize: {gate: {least_questions: 4}}"
    (folder / "mine.yaml").write_text(f"extends: micro\nname: mine\n{sources}\n{stages}\n{rest}\n")
    return "mine.yaml"


@pytest.mark.parametrize(("lost", "of", "refused"), [(0, 20, False), (2, 40, False), (40, 40, True), (8, 10, True)])
def test_the_first_records_are_opened(tmp_path: Path, lost: int, of: int, refused: bool) -> None:
    """It said that preflight would pass, and after minutes the run was stopped by data that nobody had opened. What is
    not certain, because there are more records than were opened, is told and refuses nothing."""
    plan = json.loads(_plan(_plates(tmp_path, lost, of), "--no-cluster", "--json").stdout)
    (opened,) = plan["opened"]
    assert opened["records"] == min(of, 16) + 4 and opened["whole"] == (of <= 16)
    assert opened["spoilt"] == sum(opened["reasons"].values()) == min(lost, 16)
    assert plan["refused"] == opened["refused"] == refused
    assert ("error" in plan) == refused and ("plates/sft/0" in str(opened["example"])) == (lost > 0)


def test_what_the_store_has_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours and cost of work that is done already were asked for a second time."""
    given = [part for pair in SAMPLES for part in ("--samples", pair)]
    asked = ("nvila-8b", "--no-cluster", "--json", *given)
    whole = json.loads(_plan(*asked).stdout)
    done = {name: "hit" if name in ("prune-image", "train-1", "train-4") else "miss" for name in ROWS}
    monkeypatch.setattr(planning, "verdicts", lambda *places: done)
    rest = json.loads(_plan(*asked).stdout)
    for before, after in zip(whole["stages"], rest["stages"], strict=True):
        hit = done[after["step"]] == "hit"
        assert (after["hours"], after["cost"]) == ((0, 0) if hit else (before["hours"], before["cost"]))
    costs = [plan["pruning"][0]["costs"]["price"] for plan in (whole, rest)]
    saves = [plan["pruning"][-1]["saves"]["price"] for plan in (whole, rest)]
    assert costs[0] > costs[1] == 0 and saves[0] > saves[1] >= 0


def test_a_large_recipe_is_planned_without_its_weights() -> None:
    """Whoever buys GPUs asks before anything is downloaded."""
    given = [part for pair in SAMPLES for part in ("--samples", pair)]
    ended = _plan(*LARGE, *given, "--gpu", "h200", "--mfu", "0.4", "--gpu-hour-price", "3")
    assert ended.exit_code == 2, "its data are not on this machine"
    plan = json.loads(ended.stdout)
    assert any("no such folder data/images" in problem for problem in plan["here"])
    assert 1.9e9 < sum(plan["parameters"].values()) < 2.1e9
    assert [stage["gpus"] for stage in plan["stages"]] == [8] * 5 and plan["places"]["quantize"]["gpus"] == "1"
    share = -(-2 * sum(plan["parameters"].values()) // 8)  # ZeRO 3 loads no more
    assert all(stage["memory"]["loading"] == share for stage in plan["stages"])
    assert all(stage["fits"] and stage["memory"]["peak"] < 141e9 for stage in plan["stages"])
    assert [stage["samples"] for stage in plan["stages"]] == [20_000, 100_000, 1_000_000, 400_000, 140_000]
    for stage in plan["stages"]:
        assert stage["cost"] == pytest.approx(stage["hours"] * 8 * 3)
    slower = json.loads(_plan(*LARGE, *given, "--gpu", "h200", "--mfu", "0.2").stdout)
    assert slower["stages"][2]["hours"] == pytest.approx(2 * plan["stages"][2]["hours"])


def test_pruning_is_told_of_before_it_is_paid_for() -> None:
    """Scoring with a large reference can cost more than the stages save by it: known afterwards, it is spent."""
    given = [part for pair in SAMPLES for part in ("--samples", pair)]
    asked = ("nvila-8b", "--no-cluster", *given, "--gpu-hour-price", "3")
    image, video, total = json.loads(_plan(*asked, "--json").stdout)["pruning"]
    assert (image["samples"], video["samples"], total["samples"]) == (400_000, 100_000, 500_000)
    assert total["pays"] and total["costs"]["price"] == pytest.approx(3 * total["costs"]["gpu_hours"])
    assert total["saves"]["gpu_hours"] == pytest.approx(sum(one["saves"]["gpu_hours"] for one in (image, video)))
    told = _plan(*asked).stdout
    assert total["verdict"] in told and "scoring      tower once" in told and "GPU hours, saves" in total["verdict"]
    dearer = _plan(*asked, "--json", "--override", "prune.large.path=hf://Efficient-Large-Model/NVILA-15B@main").stdout
    assert json.loads(dearer)["pruning"][-1]["verdict"].startswith("costs more than it saves")
    off = json.loads(_plan(*LARGE, *given).stdout)["pruning"][-1]
    assert (off["verdict"], off["pays"]) == ("all samples stay; costs nothing", None)


@pytest.mark.parametrize("name", [name for name in shipped() if name != "tiny-finetune"])
def test_shipped_recipes_fit_the_gpus_they_are_written_for(name: str) -> None:
    """A micro batch of 256 frames that is too large ends a run in its last stage, after days."""
    plan = json.loads(_plan(name, "--no-cluster", "--json", "--gpu", "4090" if name == "finetune" else "h100").stdout)
    assert plan["stages"] and all(stage["fits"] is True for stage in plan["stages"])


def test_a_stage_that_fills_the_gpu_does_not_fit() -> None:
    """CUDA's context and NCCL's buffers need their place too: the first collective would end such a stage."""
    need = Memory(weights=79 * 10**9, gradients=0, optimizer=0, buffers=0, activations=0, loading=0)
    stage = StagePlan("train-1", 8, need, None, None, None, None, None)
    assert stage.fits(GPUS["h100"]) is False and stage.fits(GPUS["h200"]) is True


def test_what_is_not_known_is_not_made_up() -> None:
    """Weights of another size than the published ones, data that are elsewhere."""
    ended = _plan(*LARGE, "--override", "model.base.llm=hf://someone/else@main")
    plan = json.loads(ended.stdout)
    assert plan["parameters"] is None
    assert {(s["memory"], s["hours"], s["cost"], s["fits"]) for s in plan["stages"]} == {(None, None, None, None)}


def test_a_cluster_that_is_away_is_a_remark_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old kubeconfig must not keep anybody from a plan; who asks for the cluster wants to know."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "gone",
        "contexts": [{"name": "gone", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "u", "user": {}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    ended = _plan("micro")
    assert ended.exit_code == 0
    assert "does not answer" in ended.stdout and "only this machine was looked at" in ended.stdout
    with pytest.raises(PreflightError, match=":9: the API server does not answer"):
        _plan("micro", "--cluster")
    monkeypatch.delenv("KUBECONFIG")
    with pytest.raises(ConfigError, match="no cluster is configured"):
        _plan("micro", "--cluster")
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_options_are_named() -> None:
    """A price of a GPU that nobody makes."""
    for gpu, mfu, price, option in (
        ("h9", 0.3, 1, "--gpu"),
        ("h100", 1.1, 1, "--mfu"),
        ("h100", 0.3, -1, "price"),
        ("h100", 0.3, math.nan, "price"),
    ):
        with pytest.raises(ConfigError, match=option):
            assumptions_of(gpu, mfu, price)
    for number in ("many", "-1", "²"):
        with pytest.raises(ConfigError, match="--samples"):
            parse_samples([f"images.sft={number}"])


def test_published_weights_without_a_linear_for_fp8_are_refused(tmp_path: Path) -> None:
    """A 2B has none of 3584 features: all of its stages would run in bf16 under the name of FP8."""
    places = {"runs": tmp_path / "runs", "store": tmp_path / "store"}
    with pytest.raises(ConfigError, match=r"train\.fp8\.min_features: no Linear .* say 1536 or less"):
        planning.make_plan(
            "nvila-lite-2b", ["train.precision=fp8-current"], assumptions_of("h100", 0.3, 2.5), {}, **places
        )


def test_a_recipe_that_is_no_text_is_named(tmp_path: Path) -> None:
    """A file saved in another encoding was a traceback of the decoder."""
    (tmp_path / "mine.yaml").write_bytes("name: é".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"mine.yaml: the file is UTF-16"):
        _plan("mine.yaml")


def test_a_stage_that_is_left_out_is_no_work(tmp_path: Path) -> None:
    """It would be shown as work to do, and as one that trains for zero hours."""
    form = Form(recipe="micro", overrides={"train": {"stages": _stages_without("micro", 2)}})
    found = verdicts(form, tmp_path / "store", tmp_path / "runs")
    assert found["train-3"] == "not asked for" and found["train-4"] == "unknown"


def _stages_without(recipe: str, index: int) -> list[Any]:
    stages = fill_in(Form(recipe=recipe)).model_dump(mode="json")["train"]["stages"]
    return [*stages[:index], None, *stages[index + 1 :]]


def test_needs_are_read_off_the_recipe() -> None:
    """What is looked for follows from what is asked for."""
    large, small = (fill_in(Form(recipe=name)) for name in ("nvila-8b", "tiny"))
    assert Need.of(large, small=False) == Need(gpus=8, can_do_without=False, s3=False, hub=True)
    assert Need.of(small, small=True) == Need(gpus=1, can_do_without=True, s3=False, hub=False)
    content = fill_in(Form(recipe="tiny-ablate")).model_dump(by_alias=True)
    content["prune"]["small"]["path"] = "s3://bucket/small"
    assert Need.of(Recipe.model_validate(content), small=True).s3


def test_a_store_that_is_away_is_not_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan would promise work that the store of results may have; or end without a word of the other steps."""
    from nvila.components.contracts.errors import Unreachable
    from nvila.components.contracts.recipe import recipe
    from nvila.components.initialize import step
    from nvila.pipelines.planning import hits

    def external(settings: Any, here: Environment) -> dict[str, Any]:
        raise Unreachable("no success in 5 tries", where="s3://b/m")

    monkeypatch.setattr(step, "external", external)
    steps = tuple(replace(row, inputs={}) if row.name == "initialize" else row for row in ROWS.values())
    monkeypatch.setattr(recipe, "pipeline_of", lambda whole: replace(PIPELINES["lifecycle"], steps=steps))
    found = hits.verdicts(Form(recipe="micro"), tmp_path / "store", tmp_path / "runs")
    assert (found["initialize"], found["validate"]) == ("unknown", "miss")
