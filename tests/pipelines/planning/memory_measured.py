"""The memory formula against torch: saved tensors of a forward pass, states of the real engine.

Run by test_planning_memory.py.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from nvila.components.contracts.precisions import PRECISIONS, Precision
from nvila.components.contracts.recipe.form import Form, fill_in
from nvila.components.contracts.recipe.methods import ADAPTERS, Lora
from nvila.components.contracts.recipe.reader import shipped
from nvila.components.contracts.recipe.train import Fp8, Run, Stage
from nvila.components.model.config.variants import SIGLIP, VARIANTS
from nvila.components.model.nvila import NVILA, build_model
from nvila.components.model.shape import Seen, Shape, count
from nvila.components.model.text.tokenizer import TokenIds
from nvila.components.model.vision.preprocess import Visual
from nvila.components.train.tuning import tune
from nvila.pipelines.planning import fp8
from nvila.pipelines.planning.memory import RESERVE_BYTES, MicroBatch, activations, largest, memory
from nvila.pipelines.planning.shape import shape_of

SIZE = 1000
TOKENS = TokenIds(SIZE, SIZE + 1, SIZE + 2, newline=198, end=SIZE - 3, pad=SIZE - 1)
TOWER = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 208}
DECODER = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 320,
    "vocab_size": SIZE,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
CONFIG = replace(
    VARIANTS["NVILA-Lite-2B"],
    vision=SIGLIP | TOWER | {"image_size": 224},
    s2_scales=(224,),
    llm=DECODER,
    projector="mlp_downsample",
    vision_mode="resize",
    max_length_tokens=1024,
)
ROWS, LENGTH = 2, 320
RANK = 8


def _stage(**methods: str) -> Stage:
    """One in which these parts learn so, besides the projector."""
    row = {"name": "x", "learning_rate": 1e-3, "data": {"a.sft": 1}, "batch": ROWS, "max_length_tokens": LENGTH}
    row |= {"trainable": ["mm_projector", *methods], "methods": methods}
    adapters = {"lora": {"rank": RANK}} if set(methods.values()) & ADAPTERS else {}
    return Stage.model_validate(row | adapters)


STAGES = [
    _stage(),
    _stage(vision_tower="full"),
    _stage(llm="full"),
    _stage(vision_tower="full", llm="full"),
    _stage(vision_tower="layernorm", llm="lora"),
    _stage(vision_tower="lora"),
    _stage(vision_tower="lora", llm="qlora"),
    _stage(llm="dora"),
]


DECODER_ALONE = Stage(name="x", trainable=["llm"], learning_rate=1e-3, data={"a.sft": 1}, batch=ROWS)


def name_of(stage: Stage) -> str:
    """By its parts and methods."""
    return "+".join(f"{part}-{method}" for part, method in stage.learning.items())


def _model(stage: Stage, dtype: torch.dtype) -> NVILA:
    torch.manual_seed(0)
    model = build_model(CONFIG, TOKENS, dtype).train()
    tune(model, stage)
    return model


def _batch(padded: bool) -> dict[str, Any]:
    """Two rows with a picture each; behind the picture's 65 tokens everything has a loss."""
    visual_tokens = 65
    ids = torch.randint(0, 150, (ROWS, LENGTH - visual_tokens + 1))
    ids[:, 0] = TOKENS.image
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[1, -1] = False
    labels = ids.masked_fill(~mask, -100)
    labels[:, 0] = -100
    visuals = [Visual("image", torch.randn(1, 3, 224, 224), None) for _ in range(ROWS)]
    return {"input_ids": ids, "attention_mask": mask, "visuals": visuals, "labels": labels}


def _micro(shape: Shape, padded: bool) -> MicroBatch:
    (largest_one,) = largest(shape, _stage(), Run(precision="fp32"), [Seen(65, 1, 64)])
    return replace(largest_one, padded=padded)


def _saved_bytes(model: NVILA, batch: dict[str, Any]) -> int:
    """Bytes that the forward pass keeps for the backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Saved:
        kept = _Saved(tensor)
        saved.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = model(**batch).loss
    assert loss.isfinite()
    storages = [kept.tensor.untyped_storage() for kept in saved]
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in weights}.values())


@dataclass(eq=False)
class _Saved:
    """Lives as long as the graph holds it."""

    tensor: torch.Tensor


@pytest.mark.parametrize("recompute", [False, True], ids=["whole", "checkpointed"])
@pytest.mark.parametrize("stage", STAGES, ids=name_of)
@pytest.mark.parametrize(
    ("precision", "padded"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)], ids=str
)
def test_saved_activations_are_those_of_the_formula(
    precision: torch.dtype, padded: bool, stage: Stage, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that is a third too low ends in the first step of stage 5, after days."""
    shape = count(CONFIG)
    model = _model(stage, precision)
    if recompute:
        model.gradient_checkpointing_enable()
        stage = stage.model_copy(update={"gradient_checkpointing": True})
    # As on a GPU: what a CPU's own saves is as wide as its inputs.
    monkeypatch.setattr(F, "dropout", lambda x, p, training, _: torch.native_dropout(x, p, training)[0] if p else x)
    element = torch.empty(0, dtype=precision).element_size()
    planned, most = activations(shape, _micro(shape, padded), stage, element)
    assert planned == pytest.approx(_saved_bytes(model, _batch(padded)), rel=0.04)
    assert most > planned


@pytest.mark.parametrize("stage", [STAGES[1], STAGES[3]], ids=name_of)
def test_torchao_keeps_inputs_as_they_come(stage: Stage) -> None:
    """A plan that counted them in FP8, or none where nothing learns from them, would be too low."""
    from nvila.components.precision import by_torchao
    from nvila.components.precision.linears import eligible

    shape, model, batch = count(CONFIG), _model(stage, torch.bfloat16), _batch(False)
    run = Run(precision="fp8-current", fp8=Fp8(min_features=64, scaling="rowwise"), packing="padded")
    linears = eligible(model, 64)
    assert len(linears) == 3 * 7
    by_torchao.use(model, linears, run, {})
    inputs = fp8.input_bytes(shape, run, 2, learns="llm" in stage.trainable)
    planned, _ = activations(shape, _micro(shape, False), stage, 2, inputs)
    assert planned == pytest.approx(_saved_bytes(model, batch), rel=0.04)
    assert fp8.weight_bytes(shape, run, recompute=False) == 0


def test_what_transformer_engine_keeps_of_a_7b() -> None:
    """By its source: a copy of each Linear's own input, and of each weight by row and by column."""
    shape = count(VARIANTS["NVILA-8B"])
    hidden, mlp, blocks = 3584, 18944, 28
    run = Run(precision="fp8-current", zero=3, gpus=8)
    block = 2 * hidden * hidden + 3 * hidden * mlp
    assert fp8.weight_bytes(shape, run, recompute=True) == 2 * block
    assert fp8.weight_bytes(shape, run, recompute=False) == 2 * block * blocks
    # q and o one copy each, beside what k, v and attention keep; gate and up two in the place of one of two bytes.
    assert fp8.input_bytes(shape, run, 2, learns=True) == hidden + hidden + (2 * hidden - 2 * hidden) + (mlp - 2 * mlp)
    every = run.model_copy(update={"fp8": Fp8(min_features=512)})
    assert (
        fp8.input_bytes(shape, every, 2, learns=True)
        == fp8.input_bytes(shape, run, 2, learns=True) + 2 * hidden - 2 * hidden
    )
    micro = replace(_micro(count(CONFIG), False), length=8192, rows=1)
    plain, low = (
        memory(shape, micro, DECODER_ALONE, one) for one in (run.model_copy(update={"precision": "bf16"}), run)
    )
    assert low.weights - plain.weights == 2 * block * blocks
    assert plain.activations - low.activations == 8192 * blocks * (mlp - 2 * hidden)
    assert (low.gradients, low.optimizer) == (plain.gradients, plain.optimizer)


def test_parameters_of_published_models_are_known() -> None:
    """All else is multiplied by them."""
    billions = {}
    for name in shipped():
        shape = shape_of(fill_in(Form(recipe=name)).model)
        assert shape is not None, name
        billions[name] = round(shape.total / 1e9, 2)
    assert billions == {
        "micro": 0.0,
        "tiny": 0.0,
        "tiny-ablate": 0.0,
        "tiny-spatial": 0.0,
        "tiny-lr-ratio": 0.0,
        "nvila-15b": 15.28,
        "nvila-8b": 8.09,
        "nvila-8b-reference": 8.09,
        "nvila-8b-video": 8.06,
        "nvila-lite-2b": 2.0,
        "nvila-lite-8b": 8.09,
    }


def test_zero_shares_what_it_shares() -> None:
    """Stage by stage one thing more is divided by the processes."""
    shape = count(CONFIG)
    micro = _micro(shape, True)
    total, trained = shape.total, shape.parameters["llm"]

    def states(zero: int) -> tuple[int, int, int]:
        need = memory(shape, micro, DECODER_ALONE, Run(precision="bf16", zero=zero, gpus=8))
        return need.weights, need.gradients, need.optimizer

    eighth = [-(-size // 8) for size in (2 * total, 4 * trained, 12 * trained)]
    assert states(0) == (2 * total, 2 * trained, 12 * trained)
    assert states(1) == (2 * total, 4 * trained, eighth[2])
    assert states(2) == (2 * total, eighth[1], eighth[2])
    assert states(3) == tuple(eighth)


def test_what_is_offloaded_is_not_on_the_gpu() -> None:
    """A model that fits with offload was said not to fit, and nobody tried."""
    shape = count(CONFIG)
    micro = _micro(shape, True)
    for zero in (2, 3):
        here, offloaded = (
            memory(shape, micro, DECODER_ALONE, Run(precision="bf16", zero=zero, gpus=8, offload=where))
            for where in ("none", "cpu")
        )
        assert (offloaded.gradients, offloaded.optimizer, offloaded.activations) == (0, 0, here.activations)
        assert offloaded.weights == (0 if zero == 3 else 2 * shape.total)


@pytest.mark.parametrize(("recipe", "gigabytes"), [("nvila-8b", 20.9), ("nvila-lite-8b", 15.7)])
def test_eight_billion_fit_a_card_of_24_gb(recipe: str, gigabytes: float) -> None:
    """What the paper promises for layer norms and QLoRA: the one stage that people without a data centre can train."""
    shape = shape_of(fill_in(Form(recipe=recipe)).model)
    assert shape is not None
    run, row = Run(precision="bf16"), _stage(vision_tower="layernorm", llm="qlora")
    wide = {"micro_batch": 1, "batch": 1, "max_length_tokens": 8192, "gradient_checkpointing": True, "lora": Lora()}
    stage = row.model_copy(update=wide)
    peak = max(memory(shape, batch, stage, run).peak for batch in largest(shape, stage, run, [shape.image]))
    assert peak / 1e9 == pytest.approx(gigabytes, abs=0.1)
    assert peak + RESERVE_BYTES <= 24e9
    half = stage.model_copy(update={"methods": {"vision_tower": "layernorm", "llm": "lora"}})
    least = min(memory(shape, batch, half, run).peak for batch in largest(shape, half, run, [shape.image]))
    assert least + RESERVE_BYTES > 24e9, "LoRA on bf16 would do"


def test_a_packed_row_is_full_of_media_or_of_text() -> None:
    """A row has room for many small pictures: with one in each, the tower's part of the peak was a fraction of it."""
    shape = count(CONFIG)
    stage = Stage(name="x", trainable=["llm"], learning_rate=1, data={"a.sft": 1}, batch=4, max_length_tokens=200)
    by_text, by_media = largest(shape, stage, Run(precision="bf16"), [Seen(65, 1, 64)])
    (padded,) = largest(shape, stage, Run(precision="bf16", packing="padded"), [Seen(65, 1, 64)])
    assert (by_text.rows, by_text.length, by_text.padded, padded.padded) == (4, 200, False, True)
    assert by_text.tower_tokens == padded.tower_tokens and by_media.tower_tokens == 3 * padded.tower_tokens
    assert (by_text.supervised, by_media.supervised) == (4 * (200 - 65), 4 * (200 - 3 * 65))


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", [_stage(llm="full"), _stage(vision_tower="layernorm", llm="qlora")], ids=name_of)
@pytest.mark.parametrize(("precision", "zero"), [("fp32", 0), ("bf16", 0), ("bf16", 2)])
def test_the_engine_holds_the_planned_states(precision: Precision, zero: int, stage: Stage) -> None:
    """Weights, gradients and optimizer states are bytes of the real engine, after a step and a second backward pass."""
    from nvila.components.train.engine import start

    batch = _batch(False)
    others = _bytes_alive()
    model = _model(stage, torch.float32 if stage.adapted == [] else getattr(torch, PRECISIONS[precision].weights))
    model.prepare_for_training()
    engine = start(model, stage, Run(precision=precision, zero=zero, gpus=1, checkpoint_seconds=60), 10, 1)
    for _ in range(2):
        loss = engine.deepspeed(**batch).loss
        engine.deepspeed.backward(loss)
        del loss
        grown = [parameter.grad for parameter in model.parameters()]  # without one look Python knows nothing of them
        alive = _bytes_alive() - others
        del grown
        engine.deepspeed.step()
    need = memory(count(CONFIG), _micro(count(CONFIG), False), stage, Run(precision=precision, zero=zero))
    assert need.weights + need.gradients + need.optimizer == pytest.approx(alive, rel=0.04)


def _bytes_alive() -> int:
    """Of every tensor that Python knows."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
