"""What a checkpoint holds besides its architecture travels through loading, saving and converting."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvila.components.contracts.errors import DataError
from nvila.components.model.checkpoint.convert import convert
from nvila.components.model.checkpoint.describe import describe, render
from nvila.components.model.checkpoint.loading import load
from nvila.components.model.checkpoint.native import load_native, save_native
from nvila.components.model.fresh import init_model
from nvila.components.model.nvila import NVILA

PROJECTORS = [
    *("identity", "linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp_downsample", "mlp_downsample_2x2_fix"),
    *("mlp_downsample_3x3_fix", "mlp_downsample_3x3_s2", "mlp_downsample_3x3_s2_new", "perceiver_4", "token_learner_1"),
]
HF_MODES = {"mlp_downsample": "dynamic_s2", "mlp_downsample_2x2_fix": "dynamic_s2", "mlp_downsample_3x3_fix": "dynamic"}
GENERATION = {
    "bos_token_id": 256,
    "do_sample": True,
    "eos_token_id": [257, 256],
    "pad_token_id": 256,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "transformers_version": "4.37.0",
}
TOP = {
    "drop_path_rate": 0.0,
    "mm_use_im_patch_token": True,
    "resume_path": "/lustre/run7/stage4",
    "transformers_version": "4.46.0",
    "tune_vision_tower": True,
    "our_team": {"ticket": 7, "reviewers": ["a", "b"]},
}


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def native(tokenizer: Any, configure: Any, folder: Path, **changes: Any) -> NVILA:
    """A native checkpoint as somebody else left it: with settings of generation, and keys that are not ours."""
    model = init_model(configure(**changes), tokenizer, 0).eval()
    save_native(model, tokenizer, folder)
    (folder / "llm/generation_config.json").write_text(json.dumps(GENERATION))
    top = folder / "config.json"
    top.write_text(json.dumps(read(top) | TOP))
    return model


def same_weights(model: NVILA, folder: Path) -> None:
    """Also of a serving folder, which lacks what is never computed."""
    mine, theirs = model.state_dict(), load(folder)[0].state_dict()
    assert [name for name, tensor in theirs.items() if not torch.equal(mine[name], tensor)] == []
    assert all("layers.2." in name or "post_layernorm" in name for name in mine.keys() - theirs.keys())


def same_files(folder: Path, original: Path) -> None:
    """All configurations say the same and all other files are the same, byte by byte."""
    files = {str(path.relative_to(original)) for path in original.rglob("*") if path.is_file()}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == files
    for name in files:
        if name.endswith("config.json"):
            assert read(folder / name) == read(original / name), name
        else:
            assert (folder / name).read_bytes() == (original / name).read_bytes(), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_there_and_back_again(projector: str, tied: bool, tokenizer: Any, configure: Any, tmp_path: Path) -> None:
    """Prevents a layout, for any projector, from losing a weight, a setting of generation or a key of somebody else."""
    mode = HF_MODES.get(projector, "resize")
    wide = {"llm": {"tie_word_embeddings": tied} | ({"hidden_size": 24} if projector == "identity" else {})}
    model = native(tokenizer, configure, tmp_path / "first", projector=projector, vision_mode=mode, **wide)
    first = tmp_path / "first"
    save_native(*load_native(first), tmp_path / "saved")
    same_files(tmp_path / "saved", first)
    for layout in ("vila", "hf") if projector in HF_MODES else ("vila",):
        convert(first, tmp_path / layout, layout)
        same_weights(model, tmp_path / layout)
        convert(tmp_path / layout, tmp_path / f"{layout}-back", "native")
        if projector == "mlp_downsample_2x2_fix" and layout == "hf":  # written as another name of the same function
            top = read(tmp_path / "hf-back/config.json")
            assert top["mm_projector_cfg"]["mm_projector_type"] == "mlp_downsample" and TOP.items() <= top.items()
        else:
            same_files(tmp_path / f"{layout}-back", first)
        inner = tmp_path / layout / ("llm" if layout == "vila" else ".")
        assert read(inner / "generation_config.json") == GENERATION
        assert TOP.items() <= read(tmp_path / layout / "config.json").items()
    convert(first, tmp_path / "serving", "serving", dtype="float32")
    same_weights(model, tmp_path / "serving")
    for layout in ("first", "serving"):
        shown = render(describe(tmp_path / layout))
        assert "temperature 0.7, top_p 0.8, top_k 20, repetition_penalty 1.05" in shown
        assert describe(tmp_path / layout).output_layer == ("the embeddings" if tied else "its own")


def test_a_serving_folder_carries_them_where_vllm_does_not_look(tokenizer: Any, configure: Any, tmp_path: Path) -> None:
    """Prevents keys of somebody else from steering vLLM, and answers that end at other tokens than the model's own."""
    model = native(tokenizer, configure, tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "once", "serving")
    convert(tmp_path / "once", tmp_path / "serving", "serving")
    content = read(tmp_path / "serving/config.json")
    assert TOP.items() <= content["nvila"].items() and "our_team" not in content
    ours = {"eos_token_id": model.tokens.end, "pad_token_id": model.tokens.pad}
    assert read(tmp_path / "serving/generation_config.json") == GENERATION | ours


def test_our_own_models_are_greedy(model: NVILA, tokenizer: Any, tmp_path: Path) -> None:
    """Prevents an empty generation_config.json where there was none to carry."""
    save_native(model, tokenizer, tmp_path)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": model.tokens.end, "pad_token_id": model.tokens.pad}
    assert read(tmp_path / "llm/generation_config.json") == ids | {"do_sample": False}
    (tmp_path / "llm/generation_config.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"generation_config\.json: not readable JSON"):
        load_native(tmp_path)


def test_ids_of_the_decoder_stay(model: NVILA, tokenizer: Any, tmp_path: Path) -> None:
    """Prevents a checkpoint's own begin and end tokens from being replaced on the way through."""
    save_native(model, tokenizer, tmp_path / "first")
    path = tmp_path / "first/llm/config.json"
    path.write_text(json.dumps(read(path) | {"bos_token_id": 256, "eos_token_id": [257, 256]}))
    save_native(*load_native(tmp_path / "first"), tmp_path / "second")
    assert read(tmp_path / "second/llm/config.json") == read(path)


def test_linear_projectors_of_our_first_versions(tokenizer: Any, configure: Any, tmp_path: Path) -> None:
    """Prevents models that were trained here, with `layers.0` for the reference's `layers`, from being refused."""
    model = native(tokenizer, configure, tmp_path / "model", projector="linear", vision_mode="resize")
    file = tmp_path / "model/mm_projector/model.safetensors"
    assert load_file(file).keys() == {"layers.weight", "layers.bias"}
    save_file({name.replace("layers", "layers.0"): t for name, t in load_file(file).items()}, file)
    same_weights(model, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "again", "native")
    assert load_file(tmp_path / "again/mm_projector/model.safetensors").keys() == {"layers.weight", "layers.bias"}


def test_an_identity_without_a_file(tokenizer: Any, configure: Any, tmp_path: Path) -> None:
    """Prevents the projector that has no weights from being asked for them."""
    wide = {"llm": {"hidden_size": 24}}
    model = native(tokenizer, configure, tmp_path / "model", projector="identity", vision_mode="resize", **wide)
    (tmp_path / "model/mm_projector/model.safetensors").unlink()
    same_weights(model, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "vila", "vila")
    same_weights(model, tmp_path / "vila")
