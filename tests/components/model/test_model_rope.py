import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nvila.components.contracts.errors import ConfigError
from nvila.components.model.checkpoint.convert import convert
from nvila.components.model.checkpoint.loading import load_flat
from nvila.components.model.checkpoint.native import load_native, save_native
from nvila.components.model.checkpoint.quantized import load_quantized
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.config.rope import with_rope
from nvila.components.model.fresh import init_model

THETA, POSITIONS = 1e6, 64
HEAD = 8
PLAIN = THETA ** (-torch.arange(0, HEAD, 2).float() / HEAD)


def yarn(factor: float) -> torch.Tensor:
    """The reference's frequencies (arXiv 2309.00071): fast ones stay, slow ones are divided, with a ramp between."""
    low, high = (HEAD * math.log(POSITIONS / (turns * 2 * math.pi)) / (2 * math.log(THETA)) for turns in (32, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), HEAD - 1)
    ramp = ((torch.arange(HEAD // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    return PLAIN / factor * ramp + PLAIN * (1 - ramp)


LINEAR = {"type": "linear", "factor": 2.0}
WRITTEN = {
    "older": lambda scaling: {"rope_theta": THETA, "rope_scaling": scaling},
    "newer": lambda scaling: {"rope_parameters": {"rope_theta": THETA, **_named(scaling)}},
    "both": lambda scaling: {
        "rope_theta": THETA,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": THETA, **_named(scaling)},
    },
    "theta inside": lambda scaling: {"rope_scaling": {**(scaling or {"type": "default"}), "rope_theta": THETA}},
}


def _named(scaling: dict[str, Any] | None) -> dict[str, Any]:
    return {"rope_type": "default"} if scaling is None else {**scaling, "rope_type": scaling["type"]}


def rotary(model: Any) -> torch.Tensor:
    return model.llm.model.rotary_emb.inv_freq


def decoder(written: dict[str, Any]) -> dict[str, Any]:
    return {"rope_theta": None, "max_position_embeddings": POSITIONS, **written}


@pytest.mark.parametrize("place", WRITTEN)
@pytest.mark.parametrize(
    ("scaling", "length", "expected"),
    [
        (None, POSITIONS, PLAIN),
        (None, POSITIONS + 1, PLAIN / 2),
        (None, 5 * POSITIONS, PLAIN / 5),
        (LINEAR, POSITIONS, PLAIN / 2),
        (LINEAR, 2 * POSITIONS, PLAIN / 2),
        (LINEAR, 3 * POSITIONS, PLAIN / 3),
        ({"type": "dynamic", "factor": 2.0}, POSITIONS, PLAIN),
        ({"type": "yarn", "factor": 4.0}, POSITIONS, yarn(4.0)),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": POSITIONS}, POSITIONS, yarn(4.0)),
    ],
)
def test_frequencies(tokenizer: Any, configure: Any, place: str, scaling: Any, length: int, expected: Any) -> None:
    """Prevents a base of 10000 where transformers 5 finds `rope_scaling`, and another scaling than the reference's."""
    config = configure(llm=decoder(WRITTEN[place](scaling)), max_length_tokens=length)
    assert torch.allclose(rotary(init_model(config, tokenizer, 0)), expected, rtol=1e-5)


@pytest.mark.parametrize(("length", "factor"), [(POSITIONS, 2.0), (4 * POSITIONS, 4.0)])
def test_every_file_says_it(tokenizer: Any, configure: Any, tmp_path: Path, length: int, factor: float) -> None:
    """Prevents stretched positions that only live in memory: saved, converted and served models have them too."""
    config = configure(llm=decoder(WRITTEN["newer"](LINEAR)), max_length_tokens=length)
    model = init_model(config, tokenizer, 0)
    expected = rotary(model)
    assert torch.allclose(expected, PLAIN / factor)
    save_native(model, tokenizer, tmp_path / "native")
    for layout in ("vila", "hf", "serving"):
        convert(tmp_path / "native", tmp_path / layout, layout)
    convert(tmp_path / "hf", tmp_path / "back", "native")
    for name in ("native", "vila", "back"):
        written = json.loads((tmp_path / name / "llm/config.json").read_text())
        assert written["rope_theta"] == THETA and written["rope_scaling"] == {"type": "linear", "factor": factor}
        assert torch.equal(rotary(load_native(tmp_path / name)[0]), expected)
    assert torch.equal(rotary(load_flat(tmp_path / "hf")[0]), expected)
    assert torch.equal(rotary(load_quantized(tmp_path / "serving")[0]), expected)
    served = json.loads((tmp_path / "serving/config.json").read_text())["text_config"]["rope_parameters"]
    assert (served["rope_theta"], served["rope_type"], served["factor"]) == (THETA, "linear", factor)


def test_files_of_both_kinds(tokenizer: Any, configure: Any, tmp_path: Path) -> None:
    """Prevents the base from being lost between a published llm/config.json and the decoder, limit above or below."""
    save_native(init_model(configure(llm=decoder({"rope_theta": THETA})), tokenizer, 0), tokenizer, tmp_path)
    path = tmp_path / "llm/config.json"
    stored = json.loads(path.read_text())
    for positions, factor in ((256, 2.0), (128, 2.0), (1024, 2.0)):
        path.write_text(json.dumps({**stored, "max_position_embeddings": positions, "rope_scaling": LINEAR}))
        assert torch.allclose(rotary(load_native(tmp_path)[0]), PLAIN / factor)


@pytest.mark.parametrize(
    ("written", "length"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 2 * POSITIONS),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 2 * POSITIONS),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}, 16),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, 16),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, 16),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 16),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 8.0}}, 16),
        ({"rope_scaling": {"type": "linear"}}, 16),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 16),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, 16),
        ({"rope_scaling": "linear"}, 16),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 3.0}}, 16),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, 16),
        ({"rope_theta": math.inf}, 16),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, 16),
    ],
)
def test_what_is_refused(configure: Any, written: dict[str, Any], length: int) -> None:
    """Prevents positions that the reference, vLLM or another version of transformers would compute otherwise."""
    with pytest.raises(ConfigError, match="rope_scaling"):
        configure(llm=decoder(written), max_length_tokens=length)
    content = configure().to_json()
    content["llm_cfg"] |= decoder(written) | {"tokenizer_model_max_length": length}
    with pytest.raises(ConfigError, match="rope_scaling"):
        ModelConfig.from_json(content)


def test_dynamic_scaling_is_not_served(tokenizer: Any, configure: Any, tmp_path: Path) -> None:
    """Prevents a server that reads positions which it does not have: vLLM 0.32 keeps those of dynamic scaling short."""
    config = configure(llm={"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    save_native(init_model(config, tokenizer, 0), tokenizer, tmp_path / "native")
    with pytest.raises(ConfigError, match="vLLM"):
        convert(tmp_path / "native", tmp_path / "serving", "serving")


def test_defaults() -> None:
    """Prevents another base or another number of positions than a `Qwen2Config` has that names none."""
    assert with_rope({}, 32768) == {"rope_theta": 1e4}
    assert with_rope({}, 32769) == {"rope_theta": 1e4, "rope_scaling": LINEAR}
