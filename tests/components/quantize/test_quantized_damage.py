"""Damaged serving folders of a compressed model: integers are right there, but only with what belongs to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvila.components.contracts.errors import DataError
from nvila.components.model.checkpoint.convert import convert
from nvila.components.model.checkpoint.quantized import load_quantized

if TYPE_CHECKING:
    from conftest import Quantized

Tensors = dict[str, torch.Tensor]
W4 = "llm.model.layers.0.mlp.up_proj"
W8 = "vision_tower.vision_model.encoder.layers.0.mlp.fc1"


def _spoil(name: str, value: float) -> Callable[[Tensors], object]:
    def spoil(tensors: Tensors) -> None:
        tensors[name].view(-1)[0] = value

    return spoil


DAMAGE: list[tuple[Callable[[Tensors], object], str]] = [
    (_spoil(f"{W4}.weight_scale", float("nan")), rf"{W4}\.weight_scale has values that are NaN"),
    (_spoil(f"{W8}.weight_scale", float("inf")), rf"{W8}\.weight_scale has values that are NaN or infinite"),
    (_spoil("mm_projector.layers.2.bias", float("nan")), r"mm_projector\.layers\.2\.bias has values that are NaN"),
    (lambda t: t.pop(f"{W8}.weight_scale"), rf"{W8}\.weight does not hold floating-point"),
    (lambda t: t.pop(f"{W4}.weight_scale"), "do not match the model"),
    (lambda t: t.pop(f"{W4}.weight_packed"), "do not fit together.*weight_packed"),
    (lambda t: t.pop(f"{W4}.weight_shape"), "do not fit together.*weight_shape"),
    (lambda t: t.pop("llm.model.norm.weight"), r"do not match the model.*llm\.model\.norm\.weight"),
    (lambda t: t.update({f"{W8}.weight": t[f"{W8}.weight"].float()}), "do not fit together.*float32"),
    (lambda t: t.update({f"{W4}.weight_packed": t[f"{W4}.weight_packed"][:-8]}), "fit together|another shape"),
    (lambda t: t.update({f"{W4}.weight_scale": t[f"{W4}.weight_scale"][:, :0]}), "fit together|another shape"),
    (lambda t: t.update({f"{W8}.weight_scale": t[f"{W8}.weight_scale"][:3]}), "fit together|another shape"),
    (lambda t: t.update({"llm.model.norm.weight": t["llm.model.norm.weight"].to(torch.int8)}), "floating-point"),
    (lambda t: t.update({"llm.odd.weight_scale": torch.ones(1)}), "do not match the model"),
]


@pytest.mark.parametrize(("damage", "match"), DAMAGE)
def test_damaged_tensors_are_named(
    quantized: Quantized, tmp_path: Path, damage: Callable[[Tensors], object], match: str
) -> None:
    """Prevents integers without their scale, scales without a value, and tracebacks out of unpacking."""
    shutil.copytree(quantized.out / "model", tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    with pytest.raises(DataError, match=match):
        load_quantized(tmp_path / "model")


def test_a_head_of_its_own_is_kept(quantized: Quantized, tmp_path: Path) -> None:
    """Prevents the head of a compressed folder from being dropped because its configuration calls it tied."""
    shutil.copytree(quantized.out / "model", tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    head = tensors["llm.model.embed_tokens.weight"] * 2
    save_file(tensors | {"llm.lm_head.weight": head}, file)
    model, _ = load_quantized(tmp_path / "model")
    assert torch.equal(model.llm.lm_head.weight, head.float())
    assert torch.equal(model.llm.get_input_embeddings().weight, tensors["llm.model.embed_tokens.weight"].float())


@pytest.mark.parametrize(
    "groups", [{"a": {"targets": ["re:.*"]}}, [1], {"a": {"format": "pack-quantized", "targets": 3}}]
)
def test_a_broken_quantization_config(quantized: Quantized, tmp_path: Path, groups: object) -> None:
    """Prevents a traceback, and quantization that is described but not applied."""
    shutil.copytree(quantized.out / "model", tmp_path / "model")
    path = tmp_path / "model/config.json"
    content = json.loads(path.read_text())
    content["quantization_config"]["config_groups"] = groups
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="not a quantization"):
        load_quantized(tmp_path / "model")
    with pytest.raises(DataError, match="quantized checkpoint cannot be converted"):
        convert(tmp_path / "model", tmp_path / "again", "serving")
