"""How parts learn: by layer norms or adapters. What is trained, what comes out of it, and how it resumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_worker import Stop, changed_parts, losses, weights

from nvila.components.contracts.errors import Preempted, TrainingError
from nvila.components.contracts.recipe.train import Stage
from nvila.components.model.checkpoint.native import load_native
from nvila.components.model.learning import quantized, trained
from nvila.components.model.nvila import NVILA
from nvila.components.model.shape import count
from nvila.components.train import loop
from nvila.components.train.job import Job
from nvila.components.train.loop import train
from nvila.components.train.tuning import tune

pytestmark = pytest.mark.usefixtures("one_rank")
MakeJob = Callable[..., Job]
DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOWER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
BLOCK = "vision_tower.encoder.layers.0"
"""The one that is computed: of two blocks the model takes what enters the second."""


def row(tower: str | None, llm: str | None, **more: Any) -> dict[str, Any]:
    """A stage in which these parts learn so, besides the projector."""
    methods = {part: method for part, method in (("vision_tower", tower), ("llm", llm)) if method}
    adapters = {"lora": {"rank": 4}} if "lora" in str(methods) or llm == "dora" else {}
    return {"trainable": [*methods, "mm_projector"], "methods": methods, **adapters, **more}


def learned(tower: str | None, llm: str | None) -> set[str]:
    """Tensors that such a stage changes, by the names of `plain`, projector left out."""
    names = set()
    if tower == "layernorm":
        names |= {f"{BLOCK}.layer_norm{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    if tower == "lora":
        names |= {f"{BLOCK}.{'mlp' if one[:2] == 'fc' else 'self_attn'}.{one}.weight" for one in TOWER}
    if llm:
        names |= {
            f"llm.model.layers.{n}.{'self_attn' if one[0] in 'qkvo' else 'mlp'}.{one}.weight"
            for n in (0, 1)
            for one in DECODER
        }
    return names


def plain(folder: str | Path) -> dict[str, Any]:
    """A checkpoint's tensors by the model's names."""
    return {name.replace("vision_model.", ""): one for name, one in weights(folder).items()}


@pytest.mark.parametrize(
    ("tower", "llm"),
    [("layernorm", None), ("lora", None), ("layernorm", "lora"), (None, "dora"), ("lora", "qlora")],
    ids=str,
)
@pytest.mark.parametrize("zero", [0, 3])
def test_a_method_trains_what_it_says(make_job: MakeJob, tower: str | None, llm: str | None, zero: int) -> None:
    """A layer norm that no gradient reaches, or a bias that moves beside adapters: another method under its name."""
    job = make_job("a", stage=row(tower, llm), run={"zero": zero})
    train(job, Stop())
    before, after = plain(job.model), plain(job.out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert {name for name in changed if not name.startswith("mm_projector")} == learned(tower, llm)
    assert any(name.startswith("mm_projector") for name in changed)
    stage = job.stage
    folders = {path.name for path in Path(job.out, "adapter").iterdir()} if stage.adapted else set()
    assert folders == set(stage.adapted)


@pytest.mark.parametrize("llm", ["lora", "dora", "qlora", "full"])
@pytest.mark.parametrize("tower", ["layernorm", "lora", "full"])
def test_the_count_is_of_what_learns(make_job: MakeJob, tower: str, llm: str) -> None:
    """A plan and a result that tell other numbers of trained parameters than there are."""
    stage = make_job("a", stage=row(tower, llm, trainable=["llm", "mm_projector", "vision_tower"])).stage
    model, _ = load_native(make_job("a").model)
    shape = count(model.config)
    whole = shape.total
    tune(model, stage)
    found = {
        part: sum(p.numel() for p in getattr(model, part).parameters() if p.requires_grad) for part in stage.trainable
    }
    assert trained(shape, stage.learning, stage.lora.rank) == found
    packed = sum(p.numel() for p in model.parameters() if p.dtype.itemsize == 1)
    assert quantized(shape, stage.learning) == 2 * packed
    assert sum(found.values()) < whole or (tower, llm) == ("full", "full")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[NVILA, Any]]:
    """The models of stages as they are before they are saved, adapters and all, with their tokenizers."""
    found: list[tuple[NVILA, Any]] = []
    save = loop._save

    def keep(model: NVILA, tokenizer: Any, *given: Any) -> None:
        save(model, tokenizer, *given)
        found.append((model.eval(), tokenizer))

    monkeypatch.setattr(loop, "_save", keep)
    return found


def logits(model: NVILA, tokenizer: Any) -> Any:
    """Of a picture and some words."""
    import torch

    from nvila.components.model.feed import Feed
    from nvila.components.model.vision.preprocess import Visual

    del Feed
    pixels = torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28)
    ids = torch.tensor([[model.tokens.image, *range(5, 25)]])
    config = replace(model.config, vision_mode="resize")
    was, model.config = model.config, config
    try:
        with torch.no_grad():
            return model(ids, torch.ones_like(ids), [Visual("image", pixels, None)]).logits
    finally:
        model.config = was
