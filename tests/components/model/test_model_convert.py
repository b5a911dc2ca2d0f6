import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.model.checkpoint import convert as module
from nvila.components.model.checkpoint.convert import convert
from nvila.components.model.checkpoint.describe import describe, render
from nvila.components.model.checkpoint.flat import read_hf_config
from nvila.components.model.checkpoint.layouts import recognise
from nvila.components.model.checkpoint.loading import load
from nvila.components.model.checkpoint.native import read_config, save_native
from nvila.components.model.fresh import init_model
from nvila.components.model.nvila import NVILA
from nvila.components.model.vision.preprocess import preprocess_image

LAYOUTS = ("native", "vila", "hf", "serving")


@pytest.fixture
def saved(model: NVILA, tokenizer: Any, tmp_path: Path) -> Path:
    save_native(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def digest(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_weights(model: NVILA, other: NVILA) -> None:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize("layout", ["native", "vila", "hf"])
def test_there_and_back(model: NVILA, saved: Path, tmp_path: Path, layout: str) -> None:
    """Prevents a layout that loses or renames a tensor, a setting or a token on the way there or back."""
    convert(saved, tmp_path / layout, layout)
    assert recognise(tmp_path / layout) == layout
    loaded, _ = load(tmp_path / layout)
    assert_same_weights(model, loaded)
    convert(tmp_path / layout, tmp_path / "back", "native")
    assert load(tmp_path / "back")[0].config == load(saved)[0].config
    back, first = digest(tmp_path / "back"), digest(saved)
    assert back.keys() == first.keys()
    assert [name for name in first if not name.endswith("config.json") and back[name] != first[name]] == []
    for name in first:
        if name.endswith("config.json"):  # keys may stand in another order
            left, right = json.loads(back[name]), json.loads(first[name])
            assert {key: left.get(key) for key in right} == right, name


def test_names_in_the_flat_layout(saved: Path, tmp_path: Path) -> None:
    """Prevents names and keys that other readers of the flat layout do not know."""
    convert(saved, tmp_path / "hf", "hf")
    names = set(load_file(tmp_path / "hf/model.safetensors"))
    assert "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight" in names
    assert {"llm.model.norm.weight", "mm_projector.layers.4.bias"} <= names
    content = json.loads((tmp_path / "hf/config.json").read_text())
    assert content["model_type"] == "nvila" and content["text_config"]["hidden_size"] == 32
    assert content["image_token_id"] + 1 == content["video_token_id"] == content["text_config"]["vocab_size"] + 2


def test_a_foreign_flat_configuration(saved: Path, tmp_path: Path, model: NVILA) -> None:
    """Prevents published flat checkpoints, which say little of the vision path, from being refused or misread."""
    convert(saved, tmp_path / "hf", "hf")
    path = tmp_path / "hf/config.json"
    content = json.loads(path.read_text())
    kept = ("model_type", "architectures", "text_config", "vision_config", "image_token_id", "video_token_id")
    path.write_text(json.dumps({key: content[key] for key in kept}))
    with pytest.raises(DataError, match="another shape"):  # says three scales, has weights for two
        load(tmp_path / "hf")
    config = read_hf_config(tmp_path / "hf")
    assert config.s2_scales == (28, 56, 84) and config.projector == "mlp_downsample" and config.max_tiles == 12
    assert config.max_length_tokens == model.config.max_length_tokens
    edit(path, model_type="nvila_lite")
    config = read_hf_config(tmp_path / "hf")
    assert (config.vision_mode, config.projector, config.s2_scales) == ("dynamic", "mlp_downsample_3x3_fix", (28,))


def test_flat_layout_refuses_what_it_cannot_say(tokenizer: Any, configure: Any, tmp_path: Path) -> None:
    """Prevents a flat checkpoint that its readers would build as another model."""
    save_native(init_model(configure(vision_mode="resize"), tokenizer, 0), tokenizer, tmp_path / "model")
    with pytest.raises(ConfigError, match="no place"):
        convert(tmp_path / "model", tmp_path / "hf", "hf")


def test_serving_answers_like_the_model(saved: Path, tmp_path: Path, model: NVILA, picture: Any) -> None:
    """Prevents a serving folder without a tensor that the features need, or one with the blocks they do not need."""
    convert(saved, tmp_path / "serving", "serving", dtype="float32")
    names = set(load_file(tmp_path / "serving/model.safetensors"))
    tower = {name for name in names if name.startswith("vision_tower")}
    assert not [name for name in tower if "layers.2." in name or "post_" in name]
    served, _ = load(tmp_path / "serving")
    visuals, newline = preprocess_image(picture(), model.config), torch.zeros(32)
    assert torch.equal(served.encode(visuals, newline)[0], model.encode(visuals, newline)[0])
    with pytest.raises(DataError, match="turned back"):
        convert(tmp_path / "serving", tmp_path / "native", "native")
    convert(saved, tmp_path / "half", "serving")
    assert {t.dtype for t in load_file(tmp_path / "half/model.safetensors").values()} == {torch.bfloat16}


def test_dtype_is_rounded_like_torch(saved: Path, tmp_path: Path, model: NVILA, monkeypatch: Any) -> None:
    """Prevents pieces from being cast or joined wrongly: the cast in small pieces is the cast of the whole."""
    monkeypatch.setattr("nvila.components.model.checkpoint.tensorfile.PIECE_ELEMENTS", 97)
    convert(saved, tmp_path / "half", "native", dtype="bfloat16")
    stored = load_file(tmp_path / "half/llm/model.safetensors")
    assert all(torch.equal(t, model.llm.state_dict()[name].bfloat16()) for name, t in stored.items())
    assert json.loads((tmp_path / "half/config.json").read_text())["model_dtype"] == "torch.bfloat16"


def test_shards_both_ways(saved: Path, tmp_path: Path, model: NVILA, tokenizer: Any, monkeypatch: Any) -> None:
    """Prevents tensors from being lost between shards of the source or of the result."""
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    for layout in ("hf", "vila"):
        convert(saved, tmp_path / layout, layout)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 3
    assert len(list((tmp_path / "vila/llm").glob("model-*-of-*.safetensors"))) > 2
    monkeypatch.undo()
    for layout in ("hf", "vila"):
        assert_same_weights(model, load(tmp_path / layout)[0])
        convert(tmp_path / layout, tmp_path / f"{layout}-back", "native")
        assert digest(tmp_path / f"{layout}-back").keys() == digest(saved).keys()


def test_interrupted_conversion_goes_on(saved: Path, tmp_path: Path, model: NVILA, monkeypatch: Any) -> None:
    """Prevents a half-written checkpoint under the final name, and finished files from being written again."""
    write, written = module.write_file, []

    def dies_after_two(path: Path, targets: Any) -> None:
        if len(written) == 2:
            raise OSError("no space left")
        written.append(path)
        write(path, targets)

    monkeypatch.setattr(module, "write_file", dies_after_two)
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    with pytest.raises(OSError, match="space"):
        convert(saved, tmp_path / "done", "hf")
    assert not (tmp_path / "done").exists()
    times = {path.name: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(module, "write_file", write)
    convert(saved, tmp_path / "done", "hf")
    assert {name: (tmp_path / "done" / name).stat().st_mtime_ns for name in times} == times
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "done/.plan").exists()
    assert_same_weights(model, load(tmp_path / "done")[0])


def test_what_is_refused(saved: Path, tmp_path: Path) -> None:
    """Prevents overwriting, mixing two conversions, and tracebacks for wrong names."""
    with pytest.raises(ConfigError, match="--to"):
        convert(saved, tmp_path / "x", "gguf")
    with pytest.raises(ConfigError, match="there already"):
        convert(saved, saved, "hf")
    (tmp_path / "y.partial").mkdir()
    (tmp_path / "y.partial/mine.txt").write_text("not yours")
    with pytest.raises(ConfigError, match="something else"):
        convert(saved, tmp_path / "y", "hf")
    assert (tmp_path / "y.partial/mine.txt").read_text() == "not yours"
    with pytest.raises(DataError, match="not there"):
        convert(tmp_path / "nothing", tmp_path / "z", "hf")
    projector = saved / "mm_projector/model.safetensors"
    tensors = load_file(projector)
    save_file({name: t for name, t in tensors.items() if name != "layers.4.bias"}, projector)
    with pytest.raises(DataError, match=r"missing.*layers\.4\.bias"):
        convert(saved, tmp_path / "z", "hf")
    whole = projector.read_bytes()
    projector.write_bytes(whole[:-5])
    with pytest.raises(DataError, match="not a safetensors file"):
        convert(saved, tmp_path / "z", "hf")


def test_code_is_neither_run_nor_copied(saved: Path, tmp_path: Path) -> None:
    """Prevents remote code of a checkpoint from running or travelling on."""
    convert(saved, tmp_path / "vila", "vila")
    (tmp_path / "vila/modeling_vila.py").write_text("raise SystemExit('executed')")
    (tmp_path / "vila/llm/tokenization.py").write_text("raise SystemExit('executed')")
    load(tmp_path / "vila")
    for layout in LAYOUTS:
        convert(tmp_path / "vila", tmp_path / f"to-{layout}", layout)
        assert not list((tmp_path / f"to-{layout}").rglob("*.py"))


def test_parts_named_by_strings(saved: Path, model: NVILA) -> None:
    """Prevents configurations whose parts are paths of the training machine from failing, or from leading outside."""
    (saved / "llm").rename(saved / "decoder")
    edit(saved / "config.json", llm_cfg="/lustre/run7/decoder", vision_tower_cfg="./vision_tower")
    assert_same_weights(model, load(saved)[0])
    assert read_config(saved).llm_hidden_size == 32
    edit(saved / "config.json", llm_cfg="Qwen/Qwen2.5-7B-Instruct")
    with pytest.raises(DataError, match="outside of the checkpoint"):
        load(saved)
    (saved / "decoder").rename(saved.parent / "elsewhere")
    edit(saved / "config.json", llm_cfg="../elsewhere")
    with pytest.raises(DataError, match="outside of the checkpoint"):
        load(saved)


def test_old_configuration_and_inner_folder(saved: Path, tmp_path: Path, model: NVILA) -> None:
    """Prevents checkpoints without the newer keys, or inside a folder `model`, from being refused."""
    content = json.loads((saved / "config.json").read_text())
    newer = ("min_tiles", "max_tiles", "video_max_tiles", "image_encoder", "video_encoder")
    (saved / "config.json").write_text(json.dumps({k: v for k, v in content.items() if k not in newer}))
    (tmp_path / "run").mkdir()
    saved.rename(tmp_path / "run/model")
    loaded, _ = load(tmp_path / "run")
    assert loaded.config.max_tiles == 12 and loaded.config.video_pool_sizes == ((1, 1, 1),)
    for key, good in (("min_tiles", 1), ("video_max_tiles", 1), ("fps", 0.0)):
        edit(tmp_path / "run/model/config.json", **{key: -4})
        with pytest.raises(ConfigError, match=key):
            load(tmp_path / "run")
        edit(tmp_path / "run/model/config.json", **{key: good})
    with pytest.raises(DataError, match="no layout"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other/config.json").write_text('{"model_type": "llama"}')
        load(tmp_path / "other")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_description(saved: Path, tmp_path: Path, model: NVILA, layout: str) -> None:
    """Prevents counts and sizes that are not those of the weights, in any layout."""
    convert(saved, tmp_path / "there", layout)
    found = describe(tmp_path / "there")
    counted = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in found.parameters}
    if layout != "serving":
        assert found.parameters == counted
    assert found.parameters["llm"] == counted["llm"] and found.layout == layout and found.variant is None
    block = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    saving = 2 * block - block * (4 + 20 / 128) / 8
    assert found.bf16_bytes - found.w4a16_bytes == pytest.approx(saving, abs=1)
    assert found.image_tokens == (5, 7) and found.one_tile_tokens == 2 and found.video_tokens == 4
    assert "5 to 7 tokens" in render(found) and f"{counted['llm']:,} parameters" in render(found)


PEAK = """
import json, resource, sys
from pathlib import Path
from nvila.components.model.checkpoint.convert import convert
from nvila.components.model.checkpoint.flat import open_checkpoint, read_hf_config
from nvila.components.model.text.tokenizer import TokenIds, load_tokenizer
from nvila.components.model.nvila import empty_model
source, target, layout = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
checkpoint = open_checkpoint(source)
empty_model(checkpoint.config, TokenIds.of(load_tokenizer(checkpoint.tokenizer)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(source, target, layout)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded(tokenizer: Any, configure: Any, tmp_path: Path) -> None:
    """Prevents a conversion that holds a whole file or a whole model: 300 MB go through in a fraction of that."""
    wide = configure(llm={"hidden_size": 1024, "intermediate_size": 8192})
    save_native(init_model(wide, tokenizer, 0), tokenizer, tmp_path / "model")
    size = sum(path.stat().st_size for path in (tmp_path / "model").rglob("*.safetensors"))
    assert size > 200e6
    for layout in ("hf", "serving"):
        command = [sys.executable, "-c", PEAK, str(tmp_path / "model"), str(tmp_path / layout), layout]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        assert int(done.stdout.split()[-1]) * 1024 < 100e6, done.stdout
