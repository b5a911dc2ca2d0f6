"""How parts learn: by layer norms or adapters. What is trained, what comes out of it, and how it resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_worker import Stop, changed_parts, losses, weights

from nvila.components.contracts.errors import Preempted, TrainingError
from nvila.components.model.checkpoint.native import load_native
from nvila.components.model.feed import Feed
from nvila.components.model.learning import quantized, trained
from nvila.components.model.nvila import NVILA
from nvila.components.model.shape import count
from nvila.components.train import loop
from nvila.components.train.data import stage_samples
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
    assert trained(shape, stage) == found
    packed = sum(p.numel() for p in model.parameters() if p.dtype.itemsize == 1)
    assert quantized(shape, stage) == 2 * packed
    assert sum(found.values()) < whole or (tower, llm) == ("full", "full")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[NVILA, Any]]:
    """The models of stages as they are when they are saved, adapters and all, with their tokenizers."""
    found: list[tuple[NVILA, Any]] = []
    save = loop._save

    def keep(model: NVILA, tokenizer: Any, *given: Any) -> None:
        save(model, tokenizer, *given)
        found.append((model.eval(), tokenizer))

    monkeypatch.setattr(loop, "_save", keep)
    return found


def logits(job: Job, model: NVILA, tokenizer: Any) -> Any:
    """Of two samples of a job."""
    import torch

    samples = stage_samples(job.stage, Path(job.samples), [], job.seed, Path(job.out))
    batch = Feed(tokenizer, model.config).batch(list(samples[:2]))
    with torch.no_grad():
        return model(**batch.forward_arguments(), full_logits=True).logits


@pytest.mark.parametrize(("tower", "llm"), [("lora", "lora"), ("lora", "dora")])
def test_what_is_merged_says_what_the_adapters_said(make_job: MakeJob, ended: list[Any], tower: str, llm: str) -> None:
    """A model that was trained and measured with adapters would be served as another one."""
    job = make_job("a", stage=row(tower, llm, learning_rate=2e-2))
    train(job, Stop())
    trained_one = logits(job, *ended[0])
    assert (logits(job, *load_native(Path(job.out, "model"))) - trained_one).abs().max() < 1e-5
    assert (logits(job, *load_native(job.model)) - trained_one).abs().max() > 0.1, "nothing was learnt"


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_peft_alone_loads_the_adapters(make_job: MakeJob, method: str) -> None:
    """Names, scaling or places of another's making: peft would load nothing, with a warning, and say what the base
    says. Under QLoRA also: the weights that are merged into are the base's, not what four bits leave of them."""
    import torch
    from peft import PeftModel
    from transformers import Qwen2ForCausalLM, SiglipVisionModel

    tower = None if method == "dora" else "lora"
    job = make_job("a", stage=row(tower, method, learning_rate=2e-2))
    train(job, Stop())
    ids, tiles = torch.arange(5, 25)[None], torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28)
    adapted, before = Path(job.out, "adapter"), Path(job.model)
    told = json.loads((adapted / "llm/adapter_config.json").read_text())
    assert told["target_modules"] == sorted(DECODER), "an order that changes with the process changes the digest"
    with torch.no_grad():
        base = Qwen2ForCausalLM.from_pretrained(before / "llm")
        plain_logits = base(ids).logits
        ours = Qwen2ForCausalLM.from_pretrained(Path(job.out, "model/llm"))(ids).logits
        theirs = PeftModel.from_pretrained(base, str(adapted / "llm")).eval()(ids).logits
        assert (ours - theirs).abs().max() < 1e-5 < 0.01 < (ours - plain_logits).abs().max()
        if tower:
            tower_base = SiglipVisionModel.from_pretrained(before / "vision_tower")
            changed = SiglipVisionModel.from_pretrained(Path(job.out, "model/vision_tower"))
            seen = [one(tiles, output_hidden_states=True).hidden_states[-2] for one in (tower_base, changed)]
            alone = PeftModel.from_pretrained(tower_base, str(adapted / "vision_tower")).eval()
            theirs = alone(tiles, output_hidden_states=True).hidden_states[-2]
            assert (seen[1] - theirs).abs().max() < 1e-5 < 1e-3 < (seen[0] - seen[1]).abs().max()


@pytest.mark.parametrize(
    ("tower", "llm", "precision", "zero"),
    [
        ("lora", "lora", "fp32", 0),
        ("layernorm", "qlora", "bf16", 0),
        ("lora", "lora", "bf16", 1),
        (None, "dora", "fp32", 2),
        ("layernorm", "lora", "bf16", 3),
    ],
)
def test_a_stopped_stage_repeats_its_dropout(
    make_job: MakeJob, tower: str | None, llm: str, precision: str, zero: int
) -> None:
    """Other inputs left out after a resume than without it: another model, and nobody could tell which."""
    stage, run = (
        row(tower, llm, lora={"rank": 4, "dropout": 0.3}, micro_batch=4),
        {"precision": precision, "zero": zero},
    )
    straight, stopped = make_job("straight", stage=stage, run=run), make_job("stopped", stage=stage, run=run)
    train(straight, Stop())
    with pytest.raises(Preempted):
        train(stopped, Stop(after=2))
    _only_what_is_trained(stopped)
    train(stopped, Stop())
    assert losses(stopped) == losses(straight)
    assert not changed_parts(weights(straight.out), weights(stopped.out))
    assert not changed_parts(weights(Path(straight.out, "adapter")), weights(Path(stopped.out, "adapter")))


def _only_what_is_trained(job: Job) -> None:
    import torch

    [folder] = Path(job.out, "checkpoints").glob("step-*")
    for file in folder.glob("*model_states.pt"):
        state = torch.load(file, weights_only=False)
        assert all("lora_" in name or "mm_projector" in name or "layer_norm" in name for name in state["module"])
        assert state["module"] and not state.get("frozen_param_fragments")


def test_dropout_acts_and_differs_between_steps_and_ranks() -> None:
    """Seeds that are the same in every step would leave out the same inputs for ever."""
    import torch

    def drawn(*place: int) -> tuple[float, ...]:
        loop._reseed(*place)
        return tuple(torch.rand(3).tolist())

    places = [(0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0)]
    assert len({drawn(*place) for place in places}) == 4
    assert drawn(0, 1, 0) == drawn(0, 1, 0)


def test_a_checkpoint_goes_with_its_own_base(make_job: MakeJob) -> None:
    """Adapters of one model beside the weights of another."""
    job = make_job("a", stage=row(None, "lora"), base="one")
    with pytest.raises(Preempted):
        train(job, Stop(after=2))
    with pytest.raises(TrainingError, match="began with another model"):
        train(job.model_copy(update={"base": "two"}), Stop())
    train(job, Stop())


@pytest.mark.parametrize(("tower", "llm"), [("lora", "lora"), ("layernorm", "qlora")])
def test_recomputed_activations_give_the_same_gradients(make_job: MakeJob, tower: str, llm: str) -> None:
    """Blocks behind frozen embeddings, whose inputs want no gradient: recomputed the reentrant way they would learn
    nothing; and dropout that is drawn anew the second time gives gradients of another pass."""
    kept = make_job("kept", stage=row(tower, llm))
    again = make_job("again", stage=row(tower, llm, gradient_checkpointing=True))
    for job in (kept, again):
        train(job, Stop())
    assert losses(again) == losses(kept)
    assert not changed_parts(weights(kept.out), weights(again.out))
