import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.data.sampling import Sampling
from nvila.components.model.checkpoint import native as checkpoint
from nvila.components.model.checkpoint.native import load_native, read_config, save_native
from nvila.components.model.config.config import LINE_BREAK_AFTER, ModelConfig
from nvila.components.model.fresh import init_model
from nvila.components.model.nvila import NVILA


@pytest.fixture
def saved(model: NVILA, tokenizer: Any, tmp_path: Path) -> Path:
    save_native(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def same_config(loaded: ModelConfig, saved: ModelConfig) -> bool:
    """Equal but for the descriptive keys that saving adds to the parts' configurations."""
    merged = replace(loaded, vision=loaded.vision | saved.vision, llm=loaded.llm | saved.llm)
    return merged == loaded and replace(loaded, vision=saved.vision, llm=saved.llm) == saved


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_is_stable(model: NVILA, tokenizer: Any, saved: Path, tmp_path: Path) -> None:
    """Prevents weights, configuration or vocabulary from drifting over save, load, save."""
    loaded, again = load_native(saved)
    assert same_config(loaded.config, model.config) and not loaded.training
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    save_native(loaded, again, tmp_path / "second")
    assert tree(tmp_path / "second") == tree(saved)


def test_layout_and_names(saved: Path) -> None:
    """Prevents a checkpoint that the reference's loader would not find or understand."""
    expected = {"config.json", "llm/config.json", "llm/generation_config.json", "llm/model.safetensors"}
    expected |= {"llm/tokenizer_config.json", "llm/vocab.json", "llm/merges.txt", "llm/added_tokens.json"}
    expected |= {"llm/special_tokens_map.json", "llm/tokenizer.json"}
    expected |= {"vision_tower/config.json", "vision_tower/model.safetensors", "vision_tower/preprocessor_config.json"}
    expected |= {"mm_projector/config.json", "mm_projector/model.safetensors"}
    assert set(tree(saved)) == expected
    tower = load_file(saved / "vision_tower/model.safetensors")
    assert "vision_model.embeddings.patch_embedding.weight" in tower
    assert "vision_model.encoder.layers.2.self_attn.out_proj.bias" in tower
    assert "vision_model.post_layernorm.weight" in tower
    assert all(name.startswith("vision_model.") for name in tower)
    llm = load_file(saved / "llm/model.safetensors")
    vocabulary = json.loads((saved / "llm/config.json").read_text())["vocab_size"]
    assert len(llm["model.embed_tokens.weight"]) == vocabulary and "lm_head.weight" not in llm
    names = set(load_file(saved / "mm_projector/model.safetensors"))
    assert names == {f"layers.{i}.{kind}" for i in (1, 2, 4) for kind in ("weight", "bias")}
    top = json.loads((saved / "config.json").read_text())
    assert top["architectures"] == ["LlavaLlamaModel"] and top["model_type"] == "llava_llama"
    assert top["s2_scales"] == "28,56" and top["mm_hidden_size"] == 48 and top["dynamic_s2"] is True


def test_untied_and_bfloat16(tokenizer: Any, configure: Any, tmp_path: Path) -> None:
    """Prevents a lost output layer, and a dtype other than asked for."""
    model = init_model(configure(llm={"tie_word_embeddings": False}), tokenizer, 0)
    save_native(model, tokenizer, tmp_path)
    assert "lm_head.weight" in load_file(tmp_path / "llm/model.safetensors")
    loaded, _ = load_native(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.llm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(loaded.llm.lm_head.weight, model.llm.lm_head.weight.bfloat16())
    with pytest.raises(ConfigError, match="dtype"):
        load_native(tmp_path, dtype="int8")


def test_tower_without_prefix_and_with_head(saved: Path, model: NVILA) -> None:
    """Prevents towers saved by transformers 5, or with SigLIP's pooling head, from being refused."""
    path = saved / "vision_tower/model.safetensors"
    tensors = {name.removeprefix("vision_model."): t for name, t in load_file(path).items()}
    save_file(tensors | {"head.probe": torch.zeros(1)}, path)
    loaded, _ = load_native(saved)
    assert torch.equal(loaded.vision_tower.post_layernorm.weight, model.vision_tower.post_layernorm.weight)


def test_extra_vocabulary_rows_are_dropped(saved: Path, model: NVILA) -> None:
    """Prevents raw Qwen checkpoints, whose embeddings are padded beyond the tokenizer, from being refused."""
    path = saved / "llm/model.safetensors"
    tensors = load_file(path)
    rows = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"model.embed_tokens.weight": torch.cat([rows, torch.ones(9, rows.shape[1])])}, path)
    edit(saved / "llm/config.json", vocab_size=len(rows) + 9)
    loaded, _ = load_native(saved)
    assert torch.equal(loaded.llm.model.embed_tokens.weight, rows) and same_config(loaded.config, model.config)


def test_shards(model: NVILA, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents large decoders from losing tensors between shards."""
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    save_native(model, tokenizer, tmp_path)
    assert len(list((tmp_path / "llm").glob("model-*-of-*.safetensors"))) > 2
    loaded, _ = load_native(tmp_path)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    index = tmp_path / "llm/model.safetensors.index.json"
    edit(index, weight_map={"a": "../../outside.safetensors"})
    with pytest.raises(DataError, match="leads out of its folder"):
        load_native(tmp_path)


def test_gathered_state_is_what_is_saved(model: NVILA, tokenizer: Any, tmp_path: Path) -> None:
    """Prevents partitioned (ZeRO-3) parameters from being saved in place of the gathered ones."""
    state = {name: torch.full_like(t, 2.0) for name, t in model.state_dict().items()}
    save_native(model, tokenizer, tmp_path, state_dict=state)
    loaded, _ = load_native(tmp_path)
    assert all(bool((t == 2).all()) for t in loaded.state_dict().values())


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


def test_broken_checkpoints(saved: Path) -> None:
    """Prevents unpickling, tracebacks and half-loaded models: each fault is named with its place."""
    tower = saved / "vision_tower/model.safetensors"
    whole = tower.read_bytes()
    tensors = load_file(tower)
    save_file({k: v for k, v in tensors.items() if "post_layernorm" not in k}, tower)
    with pytest.raises(DataError, match=r"missing.*post_layernorm"):
        load_native(saved)
    save_file(tensors | {"vision_model.post_layernorm.bias": torch.zeros(3)}, tower)
    with pytest.raises(DataError, match=r"another shape.*\(3,\) instead of \(24,\)"):
        load_native(saved)
    save_file(tensors | {"vision_model.surplus": torch.zeros(3)}, tower)
    with pytest.raises(DataError, match="does not have"):
        load_native(saved)
    tower.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="not a safetensors file"):
        load_native(saved)
    tower.unlink()
    (saved / "vision_tower/pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="Only safetensors"):
        load_native(saved)
    tower.write_bytes(whole)
    (saved / "mm_projector/config.json").unlink()
    with pytest.raises(DataError, match="mm_projector"):
        load_native(saved)
    with pytest.raises(DataError, match="not there"):
        load_native(saved / "elsewhere")


def test_code_in_a_checkpoint_is_ignored(saved: Path) -> None:
    """Prevents remote code: a module named by the configuration must not be imported."""
    (saved / "llm/evil.py").write_text("raise SystemExit('executed')")
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    edit(saved / "llm/config.json", auto_map=auto)
    edit(saved / "llm/tokenizer_config.json", auto_map=auto)
    load_native(saved)


def test_config_json_round_trip(configure: Any) -> None:
    """Prevents settings that survive in memory but not in config.json."""
    for mode in ("resize", "pad", "dynamic", "s2", "dynamic_s2"):
        config = configure(vision_mode=mode, video_pool_sizes=((2, 1, 1), (1, 1, 1)))
        assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    for texts in (("", "", ""), ("frame", "\n", ""), ("", "\n", "||"), LINE_BREAK_AFTER):
        config = configure(video_texts=texts, soft_ce_std=2.0, video_pool_sizes=((1, 1, 1),))
        assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_old_and_foreign_configurations(configure: Any, saved: Path) -> None:
    """Prevents published configurations without the newer keys from failing, and unsupported ones from passing."""
    content = configure(video_pool_sizes=((1, 1, 1),), max_tiles=12, sampling=Sampling(8)).to_json()
    old = {k: v for k, v in content.items() if k not in ("max_tiles", "video_encoder", "image_encoder")}
    assert ModelConfig.from_json(old) == ModelConfig.from_json(content)
    as_string = content | {"video_encoder": json.dumps({"pool_sizes": [[8, 1, 1]]}), "s2_scales": [56, 28]}
    read = ModelConfig.from_json(as_string)
    assert read.video_pool_sizes == ((8, 1, 1),) and read.s2_scales == (28, 56)
    for wrong in (
        {"dynamic_s2": False, "image_aspect_ratio": "anyres"},
        {"dynamic_s2": False, "s2": True, "image_aspect_ratio": "pad"},
        {"mm_vision_select_feature": "patch"},
        {"image_encoder": {"start_tokens": "||"}},
        {"s2_scales": "28,50"},
        {"max_tiles": 3},
        {"mm_vision_select_layer": -9},
        {"llm_cfg": {}},
    ):
        with pytest.raises(ConfigError):
            ModelConfig.from_json(content | wrong)
    edit(saved / "llm/config.json", model_type="llama")
    with pytest.raises(ConfigError, match="Qwen2"):
        load_native(saved)
    edit(saved / "llm/config.json", model_type="qwen2", vocab_size=10)
    with pytest.raises(ConfigError, match="vocab_size"):
        load_native(saved)


def test_part_configurations_count(saved: Path) -> None:
    """Prevents a stale copy in the top configuration from deciding the architecture."""
    edit(saved / "config.json", llm_cfg={"hidden_size": 1, "tokenizer_model_max_length": 77}, vision_tower_cfg={})
    config = read_config(saved)
    assert config.llm_hidden_size == 32 and config.max_length_tokens == 77
    edit(saved / "config.json", llm_cfg=None)
    assert read_config(saved).max_length_tokens == 256
