from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from servable import QUESTION

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.model.checkpoint.describe import describe, render
from nvila.components.model.checkpoint.native import load_native
from nvila.components.model.checkpoint.quantized import DynamicInt8Linear, load_quantized, unpack_w4
from nvila.components.model.text.conversation import Turn
from nvila.components.quantize.step import Settings, _calibration, run

if TYPE_CHECKING:
    from conftest import Quantized


def _settings(**changes: Any) -> Settings:
    return Settings.model_validate(
        {"quantize": {"group_size": 32, "calibration_samples": 6, **changes}, "seed": 0, "max_skipped_share": 0.01}
    )


def test_map_names_every_linear(quantized: Quantized) -> None:
    """A Linear that silently stays in full precision, or is quantized by accident, would go unnoticed."""
    model, _ = load_native(quantized.inputs["model"].dir("model"))
    schemes = json.loads((quantized.out / "module_map.json").read_text())
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(schemes) == len(linears)
    assert quantized.outcome.result.linears == {"W4A16": 14, "W8A8": 12, "bf16": 3, "unused": 6}
    assert schemes["vision_tower.vision_model.encoder.layers.1.mlp.fc2"] == "W8A8"
    assert schemes["vision_tower.vision_model.encoder.layers.2.mlp.fc2"] == "unused"
    assert schemes["llm.model.layers.0.self_attn.q_proj"] == "W4A16"
    assert schemes["mm_projector.layers.2"] == schemes["llm.lm_head"] == "bf16"


def test_stored_dtypes_follow_the_map(quantized: Quantized) -> None:
    """A map that says W4A16 over a file that holds bf16 weights would be a lie."""
    tensors = load_file(quantized.out / "model/model.safetensors")
    schemes = json.loads((quantized.out / "module_map.json").read_text())
    for name, scheme in schemes.items():
        if scheme == "W8A8":
            assert tensors[f"{name}.weight"].dtype == torch.int8
            assert tensors[f"{name}.weight_scale"].dtype == torch.float32
        elif scheme == "W4A16":
            assert f"{name}.weight" not in tensors
            assert tensors[f"{name}.weight_packed"].dtype == torch.int32
        elif scheme == "bf16" and name != "llm.lm_head":
            assert tensors[f"{name}.weight"].dtype == torch.bfloat16
        else:
            assert f"{name}.weight" not in tensors
    assert quantized.outcome.result.bytes_after == sum(tensor.nbytes for tensor in tensors.values())
    assert quantized.outcome.result.bytes_after < 0.7 * quantized.outcome.result.bytes_before


def test_config_is_mixed_precision_with_a_format_per_group(quantized: Quantized) -> None:
    """vLLM picks its kernels by the group's own format; with one global format it would misread the other half."""
    config = json.loads((quantized.out / "model" / "config.json").read_text())["quantization_config"]
    formats = [group["format"] for group in config["config_groups"].values()]
    assert config["format"] == "mixed-precision"
    assert formats == ["int-quantized", "pack-quantized"]
    assert str(quantized.inputs["model"].folder) not in (quantized.out / "model" / "config.json").read_text()


def test_quantized_model_stays_close(quantized: Quantized, ask: Callable[[Any, Any], torch.Tensor]) -> None:
    """Scales of a wrong axis, a swapped nibble or smoothing that is not undone would wreck the logits."""
    full = ask(*load_native(quantized.inputs["model"].dir("model")))
    small = ask(*load_quantized(quantized.out / "model"))
    similarity = torch.cosine_similarity(full.flatten(1), small.flatten(1)).min()
    assert similarity > 0.97
    assert not torch.equal(full, small)


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_other_methods(
    method: str, quantized: Quantized, tmp_path: Path, ask: Callable[[Any, Any], torch.Tensor]
) -> None:
    """A method of the recipe that the step cannot run; AWQ stores zero points and moves scales between layers."""
    run(_settings(method=method), quantized.inputs, tmp_path)
    full = ask(*load_native(quantized.inputs["model"].dir("model")))
    small = ask(*load_quantized(tmp_path / "model"))
    assert torch.cosine_similarity(full.flatten(1), small.flatten(1)).min() > 0.93


def test_same_inputs_same_bytes(quantized: Quantized, tmp_path: Path) -> None:
    """The store promises that the same key gives the same output."""
    again = run(_settings(method="gptq"), quantized.inputs, tmp_path)
    assert again.result == quantized.outcome.result
    first, second = (load_file(folder / "model/model.safetensors") for folder in (quantized.out, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_to_quantize_still_gives_a_servable_folder(quantized: Quantized, tmp_path: Path) -> None:
    """`none` for both parts is the plain baseline of the same form."""
    outcome = run(_settings(vision_tower="none", llm="none"), quantized.inputs, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    assert outcome.result.bytes_after == outcome.result.bytes_before
    assert set(outcome.result.linears) == {"bf16", "unused"}


def test_group_size_that_does_not_divide_is_the_users_error(quantized: Quantized, tmp_path: Path) -> None:
    """llm-compressor would fail deep inside, or vLLM only when the model is loaded."""
    with pytest.raises(
        ConfigError, match=r"quantize\.group_size: group_size 48 does not divide the 128 input features"
    ):
        run(_settings(group_size=48), quantized.inputs, tmp_path)


def test_unpacking_agrees_with_compressed_tensors() -> None:
    """Our own reading of the packed format against the library that wrote it."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (16, 64), generator=generator, dtype=torch.int8)
    zero = torch.randint(-8, 8, (16, 2), generator=generator, dtype=torch.int8)
    scale = torch.rand(16, 2, generator=generator)
    unpacked = unpack_w4(pack_to_int32(values, 4), scale, pack_to_int32(zero, 4, packed_dim=0), [16, 64])
    expected = (values.view(16, 2, 32).float() - zero[:, :, None]) * scale[:, :, None]
    assert torch.equal(unpacked, expected.view(16, 64))


def test_int8_inputs_are_rounded_per_token() -> None:
    """A scale over the whole batch would make an answer depend on what else is asked."""
    layer = DynamicInt8Linear(8, 4)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    together = layer(torch.cat([x, 100 * x]))[:3]
    assert torch.equal(layer(x), together)
    assert not torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_calibration_leaves_out_what_cannot_be_read(inputs: dict[str, Manifest], tmp_path: Path) -> None:
    """One picture that is gone ended the step, behind all training."""
    import pyarrow.parquet as parquet

    from nvila.components.data.samples import write_samples

    rows = parquet.read_table(inputs["samples"].path("samples.parquet")).to_pylist()
    gone = next(row for row in rows if row["split"] == "sft")
    write_samples(tmp_path / "samples.parquet", [row | {"media": ["gone.png"]} if row is gone else row for row in rows])
    samples = Manifest(step="validate", key="k", kind="dataset", files=describe_files(tmp_path), folder=str(tmp_path))
    model, tokenizer = load_native(inputs["model"].dir("model"))
    given = {"quantize": {"group_size": 32, "calibration_samples": 10}, "seed": 0, "max_skipped_share": 0.01}
    batches, skipped = _calibration(model, tokenizer, samples, Settings.model_validate(given))
    assert len(batches) == 9 and skipped.records == 1
    assert gone["id"] in skipped.first[0] and "gone.png" in skipped.first[0]


@pytest.fixture
def ask(quantized: Quantized) -> Callable[[Any, Any], torch.Tensor]:
    """Last logits of a question about each of two pictures."""
    from PIL import Image

    from nvila.components.model.batch import collate
    from nvila.components.model.text.prompt import make_prompt

    root = Path(quantized.inputs["samples"].folder).parent / "data"

    def logits(model: Any, tokenizer: Any) -> torch.Tensor:
        prompts = [
            make_prompt([Turn("human", QUESTION)], [Image.open(root / f"{i}.png")], model.config) for i in (0, 1)
        ]
        batch = collate([(p.encode(tokenizer, generate=True), p.visuals) for p in prompts], tokenizer.pad_token_id)
        with torch.no_grad():
            output = model(batch.input_ids, batch.attention_mask, batch.visuals)
        assert output.logits is not None
        return output.logits[:, -1].float()

    return logits


def test_inspect_describes_it(quantized: Quantized) -> None:
    """`nvila inspect` of what is served must count the model's weights, not packed integers and their scales."""
    plain = describe(quantized.inputs["model"].dir("model"))
    found = describe(quantized.out / "model")
    assert found.schemes == {"W8A8": 12, "W4A16": 14} and plain.schemes == {}
    for part in ("llm", "mm_projector"):
        assert found.parameters[part] == plain.parameters[part]
    block = plain.config.vision
    hidden, mlp = block["hidden_size"], block["intermediate_size"]
    unused = 4 * hidden * (hidden + 1) + 2 * hidden * mlp + hidden + mlp + 4 * hidden + 2 * hidden
    assert found.parameters["vision_tower"] == plain.parameters["vision_tower"] - unused
    assert found.stored_bytes == quantized.outcome.result.bytes_after < found.bf16_bytes
    assert "quantized to W4A16" in render(found) and "14 Linears" in render(found)
