"""The recipe: messages that lead to the right key, and slices that keep steps apart."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.layers import parse_recipe
from nvila.components.contracts.recipe.recipe import slices

STAGE = {
    "name": "a stage",
    "trainable": ["mm_projector"],
    "learning_rate": 1e-3,
    "data": {"shapes.captions": 1},
    "batch": 8,
}
TRAINED = {"epochs": 5}
RECIPE: dict[str, Any] = {
    "name": "test",
    "model": {"s2_scales": [28, 56], "base": {}},
    "data": {
        "sources": [
            {"name": "shapes", "kind": "image", "path": "data/shapes"},
            {"name": "clips", "kind": "video", "path": "data/clips"},
        ]
    },
    "train": {"stages": [{**STAGE, "name": f"stage {i}"} for i in range(1, 6)]},
    "evaluate": {"sources": ["shapes", "clips"]},
}


def changed(dotted: str, value: Any) -> dict[str, Any]:
    """`RECIPE` with one option set; list items by index."""
    recipe = copy.deepcopy(RECIPE)
    place: Any = recipe
    *parents, last = dotted.split(".")
    for part in parents:
        place = place[int(part)] if part.isdigit() else place.setdefault(part, {})
    place[int(last) if last.isdigit() else last] = value
    return recipe


def without(dotted: str) -> dict[str, Any]:
    recipe = changed(dotted, None)
    place: Any = recipe
    *parents, last = dotted.split(".")
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    del place[last]
    return recipe


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (changed("trian", {}), r"test\.yaml: unknown recipe key trian\. Did you mean train\?"),
        (changed("model.projektor", "linear"), r"model\.projektor\. Did you mean model\.projector\?"),
        (changed("train.stages.1.learning_rat", 1), r"train\.stages\.1\.learning_rat\. Did you mean .*learning_rate\?"),
        (changed("prune.small.decoder.hiden", 1), r"Did you mean prune\.small\.decoder\.hidden\?"),
        (changed("evaluate.gate.zzz", 1), r"unknown recipe key evaluate\.gate\.zzz\. Known here: above_question_only"),
        (changed("register.model", 1), r"Did you mean register\.model_name\?"),
        (changed("model.variant", "mine"), r"unknown recipe key model\.variant\. It decides nothing: delete it"),
    ],
    ids=lambda value: None,
)
def test_an_unknown_key_names_its_path_and_the_nearest_one(recipe: dict[str, Any], message: str) -> None:
    """A misspelt option that is ignored trains for days with the default."""
    with pytest.raises(ConfigError, match=message):
        parse_recipe(recipe, "test.yaml")


@pytest.mark.parametrize("dotted", ["model.base", "train.stages.4.batch", "evaluate.sources", "data.sources.0.path"])
def test_a_missing_key_is_named(dotted: str) -> None:
    """A default for what must be chosen would choose silently."""
    with pytest.raises(ConfigError, match=f"recipe key {dotted} is missing".replace(".", r"\.")):
        parse_recipe(without(dotted))


def test_plain_s2_takes_cells_of_three() -> None:
    """Plain S2 projects its map whole; only blocks that are projected one by one would pad cells at their borders."""
    recipe = changed("model.vision_mode", "s2")
    recipe["model"]["projector"] = "mlp_downsample_3x3_s2"
    assert parse_recipe(recipe).model.projector == "mlp_downsample_3x3_s2"


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("model.projector", "mlp_downsample_3x3_fix", r"model.*mlp_downsample_3x3_fix and vision_mode dynamic_s2"),
        (
            "model.projector",
            "perceiver_120",
            r"model\.projector: 120 tokens are no square; the nearest are 100 and 121",
        ),
        ("model.projector", "mlp_upsample", r"model\.projector: unknown projector.*token_learner_\{N\}"),
        ("model.s2_scales", [28], "needs at least two s2_scales"),
        ("model.s2_scales", [], "s2_scales"),
        ("model.s2_scales", [28, 50], "multiple of the first"),
        ("model.s2_scales", [56, 28], "ascending"),
        ("model.s2_output_scale", 2, "names no entry"),
        ("model.max_tiles", 3, "max_tiles 3 is less than the 4 tiles"),
        ("model.video", {"frames": 6, "pool_sizes": [[4, 1, 1]]}, "not a multiple of the temporal pool 4"),
        ("model.video", {"frames": 6, "pool_sizes": [[0, 1, 1]]}, "greater than or equal to 1"),
        ("model.base", {"vision_tower": "weights/tower"}, "vision_tower and llm go together"),
        ("model.base.tower", {"patch_pixels": 13}, "patch_pixels must divide"),
        ("model.base.decoder", {"heads": 3}, "must be a multiple of heads 3"),
        (
            "train.stages.0.data",
            {"shapes.heldout": 1},
            r"train\.stages\.0\.data: 'shapes.heldout' is not SOURCE\.SPLIT",
        ),
        ("train.stages.2.data", {"shape.sft": 1}, r"train\.stages\.2\.data: 'shape.sft'"),
        ("train.stages.2.data", {"shapes": 1}, r"train\.stages\.2\.data: 'shapes'"),
        ("train.stages.0.data", {"shapes.sft": 0}, "greater than or equal to 0.000001"),
        ("train.stages.0.batch", 0, "greater than or equal to 1"),
        ("train.stages", [], "at least 1 item"),
        ("train.stages", [None], "no stage is left"),
        ("train.gpus", 3, "stage 1: batch 8 is not a multiple of micro_batch 2 times 3 gpus"),
        ("train.stages.1.micro_batch", 3, "stage 2: batch 8 is not a multiple of micro_batch 3 times 1 gpus"),
        ("train.stages.0.learning_rate", float("inf"), "finite number"),
        ("needs", {"memory_bytes": -1}, "greater than or equal to 0"),
        ("train.zero", 4, r"train\.zero"),
        ("train.offload", "cpu", r"train\.offload: offload needs zero 2 or 3"),
        ("train.precision", "fp8", r"train\.precision: Input should be .fp32., .bf16., .fp8-current."),
        ("train.precision", "fp8-current", r"train\.fp8\.min_features: no Linear of the decoder would .* FP8"),
        ("train.fp8", {"min_features": 15}, r"train\.fp8\.min_features: .* greater than or equal to 16"),
        ("train.fp8", {"min_features": 2**20 + 1}, r"train\.fp8\.min_features: .* less than or equal to 1048576"),
        ("train.fp8", {"scaling": "blockwise"}, r"train\.fp8\.scaling: .*tensorwise. or .rowwise."),
        ("evaluate.sources", ["nothing"], r"evaluate\.sources: no source is called 'nothing'"),
        ("evaluate.limit", 0, r"evaluate\.limit"),
        ("evaluate.gate.min_accuracy", {"shapes": 40}, r"evaluate\.gate\.min_accuracy\.shapes"),
        ("evaluate.gate.least_questions", 0, r"evaluate\.gate\.least_questions"),
        ("quantize.gate.least_questions", 0, r"quantize\.gate\.least_questions"),
        ("evaluate.gate.min_accuracy", {"nothing": 0.5}, r"evaluate\.gate\.min_accuracy: no source"),
        ("prune.keep_ratio_of", {"nothing": 0.5}, r"prune\.keep_ratio_of: no source"),
        ("prune.keep_ratio_of", {"shapes": 2}, "less than or equal to 1"),
        ("prune.keep_ratio", 0, r"prune\.keep_ratio"),
        ("prune.keep_ratio_of", {"clips": 0.5}, r"keep_ratio_of: all of clips stays: no stage with pruned: true"),
        ("train.stages.0.pruned", True, "pruned: true draws less of sft splits, and the stage's data has none"),
        ("data.sources.1.name", "shapes", "two sources share a name"),
        ("rollout.port", 70000, r"rollout\.port"),
    ],
)
def test_what_cannot_work_is_refused(dotted: str, value: Any, message: str) -> None:
    """A recipe that fails in the fifth stage has cost four."""
    with pytest.raises(ConfigError, match=message):
        parse_recipe(changed(dotted, value))


def test_a_scaling_that_a_precision_does_not_have_is_refused() -> None:
    """Rowwise would be believed, and the stage scaled by block."""
    for precision in ("fp8-delayed", "fp8-block"):
        recipe = changed("train.precision", precision)
        recipe["train"]["fp8"] = {"min_features": 16, "scaling": "rowwise"}
        with pytest.raises(ConfigError, match=r"train\.fp8\.scaling: rowwise would have no effect"):
            parse_recipe(recipe)
    recipe["train"]["precision"] = "fp8-current"
    assert parse_recipe(recipe).train.run.fp8.scaling == "rowwise"


def affected(dotted: str, value: Any) -> set[str]:
    """Steps whose slice changes with the option."""
    before, after = (slices(parse_recipe(_tuned(recipe))) for recipe in (changed("seed", 0), changed(dotted, value)))
    return {step for step in before if before[step] != after[step]}


def _tuned(recipe: dict[str, Any]) -> dict[str, Any]:
    """With two stages that are pruned."""
    for place, data in ((3, IMAGE), (4, VIDEO)):
        recipe["train"]["stages"][place] = (row := recipe["train"]["stages"][place]) and {
            **row,
            "data": data,
            "pruned": True,
        }
    return recipe


IMAGE, VIDEO = {"shapes.sft": 1.0}, {"shapes.captions": 1.0, "clips.sft": 0.5}
STAGES = {f"train-{i}" for i in range(1, 6)}
PRUNES = {"prune-image", "prune-video"}


@pytest.mark.parametrize(
    ("dotted", "value", "steps"),
    [
        ("evaluate.max_new_tokens", 4, {"preflight", "evaluate", "evaluate-quantized"}),
        ("evaluate.limit", 99, {"preflight", "evaluate", "evaluate-quantized"}),
        ("evaluate.gate.above_question_only", False, {"preflight", "gate"}),
        ("prune.keep_ratio", 0.25, {"preflight", *PRUNES}),
        ("train.stages.3.learning_rate", 1.0, {"preflight", "train-4"}),
        ("train.stages.3", None, {"preflight", "prune-image", "train-4"}),
        ("train.precision", "fp32", {"preflight", *STAGES}),
        ("train.fp8", {"min_features": 32}, {"preflight", *STAGES}),
        ("quantize.method", "rtn", {"preflight", "quantize"}),
        ("quantize.gate.max_loss", 0.5, {"preflight", "gate-quantized"}),
        ("quantize.limit", 50, {"preflight", "evaluate-quantized"}),
        ("rollout.port", 8000, {"preflight", "rollout"}),
        ("register.model_name", "other", {"preflight", "register"}),
        ("needs.disk_bytes", 1, {"preflight"}),
        ("data.validation.max_pixels", 9999, {"preflight", "validate"}),
        ("model.max_length_tokens", 99, {"initialize"}),
        ("name", "other", {"preflight", "register"}),
        ("evaluate.gate.least_questions", 40, {"preflight", "gate"}),
    ],
)
def test_an_option_reaches_only_the_steps_that_read_it(dotted: str, value: Any, steps: set[str]) -> None:
    """A slice that is too wide trains again for a new port; one that is too narrow serves old results."""
    assert affected(dotted, value) == steps


def test_a_stage_may_be_left_out() -> None:
    """Three stages for a small model must not need a pipeline of their own; six must not end after five."""
    found = slices(parse_recipe(changed("train.stages", [STAGE, None, STAGE])))
    assert [bool(found[step]) for step in sorted(STAGES)] == [True, False, True, False, False]
    with pytest.raises(ConfigError, match="6 stages, and this pipeline has training steps for 5"):
        slices(parse_recipe(changed("train.stages", [STAGE] * 6)))


def test_the_seed_reaches_every_step_that_draws() -> None:
    """A seed that one step ignores makes two seeds look alike."""
    assert affected("seed", 1) == {"initialize", *PRUNES, *STAGES, "evaluate", "quantize"}


def pruned(*stages: dict[str, float] | None, **prune: Any) -> dict[str, Any]:
    """`RECIPE` with these stages, each on its data and pruned."""
    recipe = changed("train.stages", [data and {**STAGE, "data": data, "pruned": True} for data in stages])
    return recipe | {"prune": prune}


def test_each_prune_step_takes_its_kind_of_source() -> None:
    """Images pruned by the video step would be scored twice, or never."""
    found = slices(parse_recipe(pruned(None, None, None, IMAGE, VIDEO)))
    assert (found["prune-image"]["sources"], found["prune-video"]["sources"]) == (["shapes"], ["clips"])


@pytest.mark.parametrize(
    ("stages", "sources"), [([IMAGE], None), ([IMAGE, VIDEO], ["clips"]), ([None, VIDEO], ["clips"])], ids=str
)
def test_what_no_stage_takes_pruned_is_not_scored(stages: list[Any], sources: list[str] | None) -> None:
    """Hours of scoring for a table that nobody reads, or a step that runs and does nothing."""
    recipe = pruned(None, None, None, *stages)
    if stages[0]:
        recipe["train"]["stages"][3]["pruned"] = False
    found = slices(parse_recipe(recipe))
    video = found["prune-video"]
    assert found["prune-image"] is None and (video and video["sources"]) == sources


def test_weights_are_those_that_are_read() -> None:
    """A run that scores nothing would be refused for a reference that it does not ask, and a folder of the decoder's
    for a name that the registry does not have."""
    small, large = {"path": "small@champion"}, {"path": "s3://b/large"}
    for prune, read in (
        ({"method": "deltaloss", "small": small, "large": large}, ["small@champion", "s3://b/large"]),
        ({"method": "multimodal-gain", "large": large}, ["s3://b/large"]),
        ({"method": "random"}, []),
        ({"method": "none", "small": small, "large": large}, []),
    ):
        content = pruned(None, None, None, IMAGE, **prune)
        content["model"]["base"] |= {"vision_tower": "weights/1", "llm": "hf://a/b@c"}
        assert parse_recipe(content).weights == ["./weights/1", "hf://a/b@c", *read]
        content["train"]["stages"][3]["pruned"] = False
        assert parse_recipe(content).weights == ["./weights/1", "hf://a/b@c"], "no stage is pruned"


def test_vllm_is_asked_for_by_a_reference() -> None:
    """A run that has no vLLM ended in the middle of pruning."""
    recipe = pruned(None, None, None, IMAGE, large={"path": "m", "engine": "vllm"})
    recipe |= {"quantize": {"through_vllm": False}, "rollout": {"target": "none"}}
    assert parse_recipe(recipe).vllm
    recipe["train"]["stages"][3]["pruned"] = False
    assert not parse_recipe(recipe).vllm


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [IMAGE],
            r"train\.stages\.0\.pruned: train-1 reads no scores of shapes.* Draw shapes\.sft in train-4 or train-5",
        ),
        ([None, None, None, VIDEO], "train-4 reads no scores of clips.* in train-5, or leave"),
    ],
)
def test_a_stage_reads_the_scores_that_it_needs(stages: list[Any], message: str) -> None:
    """It ended for want of samples when the stages before it had been trained."""
    with pytest.raises(ConfigError, match=message):
        slices(parse_recipe(pruned(*stages)))


@pytest.mark.parametrize(
    ("prune", "idle"),
    [
        ({"method": "random", "untrusted": "random"}, "method random does not read prune.untrusted: take it out"),
        ({"method": "clusters", "small": TRAINED, "score": "mean"}, "does not read prune.score, prune.small: take"),
        ({"method": "multimodal-gain", "small": TRAINED}, "does not read prune.small"),
        ({"vision_clusters": 8}, "method deltaloss does not read prune.vision_clusters"),
        ({"question_clusters": 9, "within": ["answer"]}, "does not read prune.question_clusters"),
    ],
    ids=str,
)
def test_what_the_method_does_not_read_is_refused(prune: dict[str, Any], idle: str) -> None:
    """A setting that has no effect is believed to have had one."""
    with pytest.raises(ConfigError, match=idle):
        parse_recipe(pruned(None, None, None, IMAGE, **prune))
    every = prune | {"compare": ["deltaloss", "clusters"], "within": ["question"]}
    assert parse_recipe(pruned(None, None, None, IMAGE, **every)).prune.idle == []
    assert parse_recipe(pruned(None, None, None, IMAGE, **prune | {"method": "none"})).references == {}


def test_all_mistakes_are_told_at_once() -> None:
    """Mending one mistake at a time, without knowing of the others, takes as many runs."""
    recipe = changed("trian", {}) | {"seed": -1}
    recipe["train"] |= {"gpus": 0, "zero": 4}
    recipe["model"]["video"] = {"frames": 5, "pool_sizes": [[2, 1, 1]]}
    with pytest.raises(ConfigError) as caught:
        parse_recipe(recipe, "mine.yaml")
    first, *others = str(caught.value).splitlines()
    assert first == "mine.yaml: 5 mistakes"
    wanted = ["unknown recipe key trian", "seed: ", "model.video.pool_sizes.0: ", "train.zero: ", "train.gpus: "]
    assert [line.strip().startswith(start) for line, start in zip(others, wanted, strict=True)] == [True] * 5


def test_very_many_mistakes_are_a_message_that_can_be_read() -> None:
    """Thousands of lines hide the first, which is often the cause of the others."""
    for recipe in (
        RECIPE | {f"key{number}": number for number in range(3000)},
        changed("evaluate.sources", [f"s{number}" for number in range(200)]),
        changed("train.stages.0.data", {"s" * 5000 + ".sft": 1}),
        changed("data.sources", [RECIPE["data"]["sources"][0]] * 200),
        RECIPE | {"k" * 50_000: 1},
        changed("name", "n" * 50_000),
        changed("evaluate.batch", -(10**400)),
    ):
        with pytest.raises(ConfigError) as caught:
            parse_recipe(recipe)
        assert len(str(caught.value)) <= 1500
