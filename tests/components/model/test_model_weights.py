"""What may become a model's weights: each fault of a checkpoint is named, by loading and by converting alike."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.model.checkpoint.convert import convert
from nvila.components.model.checkpoint.describe import describe, render
from nvila.components.model.checkpoint.loading import load
from nvila.components.model.checkpoint.native import load_native, save_native
from nvila.components.model.checkpoint.quantized import load_quantized
from nvila.components.model.checkpoint.serving import write_serving
from nvila.components.model.checkpoint.tensorfile import is_finite
from nvila.components.model.fresh import init_model
from nvila.components.model.nvila import NVILA

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def folders(tokenizer: Any, configure: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A native checkpoint by whether its output layer is tied."""
    made = {}
    for tied in (True, False):
        made[tied] = tmp_path_factory.mktemp("weights") / "model"
        model = init_model(configure(llm={"tie_word_embeddings": tied}), tokenizer, seed=3)
        save_native(model, tokenizer, made[tied])
    return made


@pytest.fixture
def saved(folders: dict[bool, Path], tmp_path: Path) -> Path:
    shutil.copytree(folders[True], tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def untied(folders: dict[bool, Path], tmp_path: Path) -> Path:
    shutil.copytree(folders[False], tmp_path / "untied")
    return tmp_path / "untied"


def change(file: Path, **tensors: torch.Tensor | None) -> None:
    """Exchange, add, or (None) remove tensors of a file; their dots are written as two underscores."""
    content = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in content.items() if tensor is not None}, file)


def config(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(folder: Path, match: str) -> None:
    """By loading, and by the conversion that loads nothing."""
    with pytest.raises(DataError, match=match):
        load_native(folder)
    with pytest.raises(DataError, match=match):
        convert(folder, folder.with_name("converted"), "native")
    shutil.rmtree(folder.with_name("converted.partial"), ignore_errors=True)


def spoiled(file: Path, name: str, value: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    tensor = load_file(file)[name].clone()
    tensor.view(-1)[-1] = value
    return tensor if dtype is None else tensor.to(dtype)


LLM, TOWER, PROJECTOR = (f"{part}/model.safetensors" for part in ("llm", "vision_tower", "mm_projector"))
MISSING = [
    (PROJECTOR, "layers.4.bias"),
    (PROJECTOR, "layers.1.weight"),
    (TOWER, "vision_model.embeddings.position_embedding.weight"),
    (TOWER, "vision_model.encoder.layers.2.mlp.fc1.bias"),
    (LLM, "model.layers.0.self_attn.q_proj.bias"),
    (LLM, "model.norm.weight"),
    (LLM, EMBEDDINGS),
]


@pytest.mark.parametrize(("file", "name"), MISSING)
def test_a_missing_tensor_is_named(saved: Path, file: str, name: str) -> None:
    """Prevents a parameter that keeps what it was initialised with."""
    change(saved / file, **{name: None})
    refused(saved, f"missing.*{name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_refused(saved: Path, value: float, dtype: torch.dtype) -> None:
    """Prevents a diverged or damaged checkpoint from answering with noise: one value of one tensor is enough."""
    name = "model.layers.1.mlp.up_proj.weight"
    change(saved / LLM, **{name: spoiled(saved / LLM, name, value, dtype)})
    refused(saved, rf"llm/model\.safetensors: (llm\.)?{name} has values that are NaN or infinite")


def test_damage_in_what_is_not_served(saved: Path, tmp_path: Path) -> None:
    """Prevents a damaged checkpoint from being served because the one spoiled tensor is among those left out."""
    name = "vision_model.post_layernorm.bias"
    change(saved / TOWER, **{name: spoiled(saved / TOWER, name, float("nan"), torch.float32)})
    with pytest.raises(DataError, match=f"{name} has values that are NaN"):
        convert(saved, tmp_path / "serving", "serving")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64]
)
def test_what_is_no_float_is_named(saved: Path, dtype: torch.dtype) -> None:
    """Prevents quantized values without their scales, flags or indices from being taken for weights."""
    name = "model.layers.0.mlp.gate_proj.weight"
    change(saved / LLM, **{name: load_file(saved / LLM)[name].to(dtype)})
    refused(saved, name)
    with pytest.raises((ConfigError, DataError), match=r"not known here|C64"):
        describe(saved)


def test_large_sums_are_finite(saved: Path) -> None:
    """Prevents sound weights from being refused because a reduction of them overflows."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        large = torch.full((9, 9), torch.finfo(dtype).max, dtype=dtype)
        assert is_finite(large) and is_finite(-large) and is_finite(large[:0])
        assert not is_finite(large * 2)
    change(saved / PROJECTOR, layers__4__bias=torch.full((32,), 65504.0, dtype=torch.float16))
    assert bool((load_native(saved)[0].mm_projector.layers[4].bias == 65504).all())


def test_a_smaller_dtype_must_hold_the_values(saved: Path, tmp_path: Path) -> None:
    """Prevents infinities that a conversion or a load in float16 makes of bfloat16's larger range."""
    name = "model.layers.0.mlp.down_proj.weight"
    change(saved / LLM, **{name: spoiled(saved / LLM, name, 1e6)})
    load_native(saved, dtype="bfloat16")
    with pytest.raises(DataError, match=f"{name} has values too large for torch.float16"):
        load_native(saved, dtype="float16")
    with pytest.raises(DataError, match="too large"):
        convert(saved, tmp_path / "half", "native", dtype="float16")
    with pytest.raises(DataError, match="infinite"):
        write_serving(*load_native(saved), tmp_path / "served", dtype=torch.float16)


def test_harmless_tensors_of_older_checkpoints(saved: Path, tmp_path: Path) -> None:
    """Prevents buffers that every version computes anew, and parts that no NVILA has, from being refused."""
    before = load_native(saved)[0].state_dict()
    change(
        saved / LLM,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
        model__rotary_emb__inv_freq=torch.ones(4),
        model__layers__0__mlp__up_proj___extra_state=torch.zeros(8, dtype=torch.uint8),  # scales of training in FP8
    )
    change(
        saved / TOWER,
        vision_model__embeddings__position_ids=torch.arange(4)[None],
        vision_model__head__probe=torch.full((1, 1, 24), torch.nan),
        text_model__final_layer_norm__bias=torch.ones(3),
        logit_scale=torch.ones(1),
        vision_model__post_layernorm__weight=load_file(saved / TOWER)["vision_model.post_layernorm.weight"].half(),
    )
    convert(saved, tmp_path / "converted", "native")
    for folder in (saved, tmp_path / "converted"):
        after = load_native(folder)[0].state_dict()
        assert all(torch.allclose(before[name], tensor, atol=1e-3) for name, tensor in after.items())
    assert not [name for name in load_file(tmp_path / "converted" / TOWER) if "head" in name or "text" in name]


def test_a_tensor_under_two_names(saved: Path) -> None:
    """Prevents the order of a file from deciding which of two tensors counts."""
    change(saved / TOWER, post_layernorm__bias=torch.ones(24))
    refused(saved, r"under two names.*vision_model\.post_layernorm\.bias")


def shards(folder: Path) -> tuple[Path, dict[str, str]]:
    """Split the decoder's file into two; returns their index and its map."""
    tensors = load_file(folder / LLM)
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, folder / "llm" / file)
    (folder / LLM).unlink()
    weight_map = {name: file for file, some in files.items() for name in some}
    index = folder / "llm/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index, weight_map


def _twice(folder: Path) -> None:
    name = next(iter(load_file(folder / "model-00001-of-00002.safetensors")))
    change(folder / "model-00002-of-00002.safetensors", **{name: torch.ones(1)})


def _forgotten(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").rename(folder / "model-00003-of-00002.safetensors")


def _index(folder: Path, **changes: str) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | changes}))


SHARDS: list[tuple[Callable[[Path], object], str]] = [
    (_twice, "two files hold tensors of the same name"),
    (_forgotten, "weights are missing"),
    (lambda folder: _index(folder, a="model-00009-of-00002.safetensors"), "weights are missing"),
    (lambda folder: _index(folder, a="model-00001-of-00002.safetensors"), "index and its shards disagree"),
    (lambda folder: _index(folder, **{EMBEDDINGS: "model-00002-of-00002.safetensors"}), "disagree"),
    (lambda folder: change(folder / "model-00002-of-00002.safetensors", extra=torch.ones(1)), "disagree"),
    (lambda folder: save_file({"a": torch.ones(1)}, folder / "model.safetensors"), "lie beside"),
    (lambda folder: save_file({"a": torch.ones(1)}, folder / "model-00001-of-00003.safetensors"), "lie beside"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}'), "not an index"),
]


@pytest.mark.parametrize(("damage", "match"), SHARDS)
def test_shards_and_their_index_agree(saved: Path, damage: Callable[[Path], object], match: str) -> None:
    """Prevents half of one model with half of another, or a shard that nobody reads."""
    shards(saved)
    load_native(saved)
    damage(saved / "llm")
    refused(saved, match)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"])
@pytest.mark.parametrize("part", [".", "llm"])
def test_adapters_are_not_left_out(saved: Path, name: str, part: str) -> None:
    """Prevents the base model from answering in the place of its fine-tune."""
    (saved / part / name).write_bytes(b"{}")
    refused(saved, "adapter.*left out")


def test_a_head_of_its_own_is_kept(untied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Prevents a trained output layer from being dropped because an old configuration calls it tied."""
    head = load_file(untied / LLM)[HEAD]
    config(untied / "llm/config.json", tie_word_embeddings=True)
    model, tokenizer = load_native(untied)
    assert torch.equal(model.llm.lm_head.weight, head) and model.config.llm["tie_word_embeddings"] is False
    assert "kept, and untied" in capfd.readouterr().err
    assert "though said to be the embeddings" in render(describe(untied))
    save_native(model, tokenizer, tmp_path / "again")
    write_serving(model, tokenizer, tmp_path / "written", dtype=torch.float32)
    for layout in ("native", "vila", "hf", "serving"):
        convert(untied, tmp_path / layout, layout, dtype="float32")
    for name in ("again", "written", "native", "vila", "hf", "serving"):
        capfd.readouterr()
        again = load(tmp_path / name)[0]
        assert torch.equal(again.llm.lm_head.weight, head), name
        assert not capfd.readouterr().err, "what is written says what it holds"
        assert describe(tmp_path / name).output_layer == "its own"
    for name in ("written", "serving", "hf"):
        content = json.loads((tmp_path / name / "config.json").read_text())
        assert content["tie_word_embeddings"] is content["text_config"]["tie_word_embeddings"] is False


def test_a_head_that_repeats_the_embeddings(saved: Path, tmp_path: Path) -> None:
    """Prevents tied checkpoints that store the head too, padded or in another dtype, from being untied or refused."""
    rows = load_file(saved / LLM)[EMBEDDINGS].bfloat16()
    padded = torch.cat([rows, torch.ones(7, 32).bfloat16()])
    change(saved / LLM, lm_head__weight=padded, model__embed_tokens__weight=rows.float())
    convert(saved, tmp_path / "converted", "native")
    for folder in (saved, tmp_path / "converted"):
        assert load_native(folder)[0].config.llm["tie_word_embeddings"] is True
    assert HEAD not in load_file(tmp_path / "converted" / LLM)


def test_rows_are_those_of_the_tokenizer_or_more(untied: Path) -> None:
    """Prevents a vocabulary cut short in the embeddings or in the head; padding behind it is dropped."""
    tensors = load_file(untied / LLM)
    for name in (EMBEDDINGS, HEAD):
        change(untied / LLM, **{name: tensors[name][:-5]})
        refused(untied, "another shape")
        change(untied / LLM, **{name: torch.cat([tensors[name], torch.full((3, 32), torch.nan)])})
    llm = load_native(untied)[0].llm.state_dict()
    assert torch.equal(llm[EMBEDDINGS], tensors[EMBEDDINGS]) and torch.equal(llm[HEAD], tensors[HEAD])


def test_a_head_that_is_nowhere(untied: Path, tmp_path: Path) -> None:
    """Prevents random logits: an untied model without its output layer is refused in each form."""
    write_serving(*load_native(untied), tmp_path / "served", dtype=torch.float32)
    change(untied / LLM, lm_head__weight=None)
    refused(untied, r"missing.*lm_head")
    assert describe(untied).output_layer == "missing"
    change(tmp_path / "served/model.safetensors", llm__lm_head__weight=None)
    with pytest.raises(DataError, match=r"do not match the model.*lm_head"):
        load_quantized(tmp_path / "served")


def test_top_level_says_tied(saved: Path, tmp_path: Path) -> None:
    """Prevents flat checkpoints that name the tie only at the top from being refused for the head they do not store."""
    convert(saved, tmp_path / "hf", "hf")
    content = json.loads((tmp_path / "hf/config.json").read_text())
    del content["text_config"]["tie_word_embeddings"]
    (tmp_path / "hf/config.json").write_text(json.dumps(content))
    assert load(tmp_path / "hf")[0].config.llm["tie_word_embeddings"] is True


def test_what_is_saved_is_whole(model: NVILA, tokenizer: Any, tmp_path: Path) -> None:
    """Prevents a checkpoint of names that nobody reads, of partitions, of a part of the model, or of a diverged one."""
    state = model.state_dict()
    name = "mm_projector.layers.4.weight"
    for wrong, match in (
        ({key: t for key, t in state.items() if key != name}, f"missing.*{name}"),
        ({f"module.{key}": t for key, t in state.items()}, "missing"),
        (state | {name: torch.empty(0)}, "another shape"),
        (state | {name: torch.full((32, 32), torch.nan)}, "layers.4.weight has values that are NaN"),
        (state | {name: torch.ones(32, 32, dtype=torch.int8)}, "floating-point"),
    ):
        with pytest.raises(DataError, match=match):
            save_native(model, tokenizer, tmp_path, state_dict=wrong)
    save_native(
        model, tokenizer, tmp_path, state_dict=dict(model.named_parameters())
    )  # ZeRO-3: a tied head has no name
    assert torch.equal(load_native(tmp_path)[0].llm.lm_head.weight, state["llm.lm_head.weight"])


def test_a_served_model_is_not_saved_as_a_whole_one(saved: Path, tmp_path: Path) -> None:
    """Prevents random tower blocks in a native checkpoint made of a serving folder, which has none of them."""
    write_serving(*load_native(saved), tmp_path / "served", dtype=torch.float32)
    served, tokenizer = load_quantized(tmp_path / "served")
    assert len(served.vision_tower.encoder.layers) == 2 and served.config.vision["num_hidden_layers"] == 3
    with pytest.raises(DataError, match=r"missing.*layers\.2"):
        save_native(served, tokenizer, tmp_path / "native")
    write_serving(served, tokenizer, tmp_path / "again", dtype=torch.float32)
    assert (
        load_file(tmp_path / "again/model.safetensors").keys()
        == load_file(tmp_path / "served/model.safetensors").keys()
    )
