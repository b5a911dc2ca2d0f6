"""Work, samples and hours of a stage."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory_measured import CONFIG, STAGES, TOKENS, _model, name_of
from torch.utils.flop_counter import FlopCounterMode

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.data import DataSettings
from nvila.components.contracts.recipe.prune import PruneSettings
from nvila.components.contracts.recipe.train import Stage
from nvila.components.data.sampling import Sampling
from nvila.components.model.shape import Seen, count
from nvila.components.model.vision.preprocess import Visual
from nvila.components.model.work import operations
from nvila.pipelines.planning.cost import Subset, samples_of, stage_work, subsets

STAGE = Stage(name="x", trainable=["llm"], learning_rate=1, data={"a.sft": 1.5, "b.captions": 2}, batch=4, pruned=True)


@pytest.mark.parametrize(
    "stage", [one for one in STAGES if one.learning.get("llm") in (None, "full", "lora")], ids=name_of
)
def test_operations_are_those_that_torch_counts(stage: Stage) -> None:
    """Hours and cost are a multiple of them. Torch counts both halves of causal attention, here 3% of the whole."""
    text = 31
    ids = torch.randint(0, 150, (1, text + 1))
    ids[:, 0] = TOKENS.image
    labels = ids.clone()
    labels[:, 0] = -100
    visuals = [Visual("image", torch.randn(1, 3, 224, 224), None)]
    model = _model(stage, torch.float32)
    model.vision_tower.set_attn_implementation("eager")
    model.llm.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(ids, torch.ones_like(ids, dtype=torch.bool), visuals, labels).loss.backward()
    shape = count(CONFIG)
    planned = operations(shape, stage, Seen(65, 1, 64).load(text, 1024))
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.06)


def test_sizes_are_read_or_given_or_unknown(tmp_path: Path) -> None:
    """A guess that looks like a fact is worse than none."""
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A plate, I think."}]
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "sft.json").write_text(json.dumps([{"conversations": turns}] * 3))
    content = [{"name": n, "kind": "image", "path": str(tmp_path / n)} for n in ("a", "b")]
    data = DataSettings.model_validate({"sources": content})
    found = subsets(data, {"b.captions": 10})
    assert {name: subset.samples for name, subset in found.items()} == {"a.sft": 3, "b.captions": 10}
    assert found["a.sft"].text_tokens == pytest.approx(35 / 4, abs=0.5)
    with pytest.raises(ConfigError, match="--samples"):
        subsets(data, {"c.sft": 1})
    (folder / "sft.json").write_text("[1, {}]")
    assert subsets(data, {})["a.sft"].samples == 2, "spoilt records are not what a plan is refused for"
    assert samples_of(STAGE, found, PruneSettings(keep_ratio=0.5)) == {"a.sft": 3, "b.captions": 20}
    assert samples_of(STAGE, {}, PruneSettings()) is None


def test_a_stage_costs_as_much_as_its_samples_show() -> None:
    """Videos show more than pictures, and rows are cut at the stage's limit."""
    shape = count(replace(CONFIG, sampling=Sampling(16)))
    known = {"a.sft": Subset(100, 20, "image"), "b.captions": Subset(100, 20, "video")}
    one, tokens = stage_work(shape, STAGE, {"a.sft": 100}, known)
    both, _ = stage_work(shape, STAGE, {"a.sft": 100, "b.captions": 100}, known)
    assert tokens == 100 * (65 + 20) and both > 10 * one
    cut, fewer = stage_work(shape, STAGE.model_copy(update={"max_length_tokens": 70}), {"a.sft": 100}, known)
    assert fewer == 100 * 70 and cut < one
