"""LoRA adapters beside the served model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from servable import WITH_VLLM, picture, servable_model

from nvila.components.contracts.errors import ConfigError, DataError, NvilaError
from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.data.media import load_image
from nvila.components.model.checkpoint.serving import write_serving
from nvila.components.model.decode.answer import generate
from nvila.components.model.text.conversation import Turn, messages_of
from nvila.components.model.text.prompt import make_prompt
from nvila.components.serve import server
from nvila.components.serve.adapters import CONFIG, WEIGHTS, options
from nvila.components.serve.ports import free_port
from nvila.pipelines.commands.endpoint import settings_of

RANK = 6


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the decoder of `servable_model`, as peft writes it."""
    folder = tmp_path_factory.mktemp("adapter")
    _adapted()[0].save_pretrained(folder)
    return folder


def _adapted() -> tuple[Any, Any, Any]:
    """Peft's model of the decoder, with an adapter that changes answers; the whole model, and its tokenizer."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = servable_model()
    torch.manual_seed(1)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    decoder = get_peft_model(model.llm, LoraConfig(r=RANK, lora_alpha=12, target_modules=linears))
    for name, parameter in decoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return decoder, model, tokenizer


def _served() -> dict[str, Any]:
    model, _ = servable_model()
    return {"text_config": model.llm.config.to_dict()}


def _key(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(content))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
TOWER = "base_model.model.encoder.layers.0.mlp.fc1.lora_A.weight"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "dora": (lambda at: _key(at, use_dora=True), "does not serve such adapters"),
    "another kind": (lambda at: _key(at, peft_type="IA3"), "does not serve such adapters"),
    "whole modules": (lambda at: _key(at, modules_to_save=["lm_head"]), "does not serve such adapters"),
    "too large a rank": (lambda at: _key(at, r=4096), "rank is 1 to 512"),
    "no rank": (lambda at: _key(at, r="6"), "rank is 1 to 512"),
    "another rank": (lambda at: _key(at, r=RANK + 1), "does not fit the model"),
    "another width": (lambda at: _tensors(at, lambda t: t.update({FIRST: torch.zeros(RANK, 64)})), "does not fit"),
    "not finite": (lambda at: _tensors(at, lambda t: t[FIRST].fill_(float("nan"))), "NaN"),
    "half a pair": (lambda at: _tensors(at, lambda t: t.pop(FIRST)), "pairs of matrices"),
    "a layer too many": (
        lambda at: _tensors(at, lambda t: t.update({FIRST.replace(".0.", ".9."): t[FIRST].clone()})),
        "no adapter of this model",
    ),
    "of the tower": (
        lambda at: _tensors(at, lambda t: t.update({TOWER: t[FIRST].clone()})),
        "no adapter of this model",
    ),
    "cut off": (lambda at: (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:-9]), "safetensors"),
    "no weights": (lambda at: (at / WEIGHTS).unlink(), "missing"),
    "no configuration": (lambda at: (at / CONFIG).unlink(), CONFIG),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_adapter_that_cannot_be_served_is_refused(adapter: Path, tmp_path: Path, what: str) -> None:
    """vLLM ends at some of them after a minute of loading, and serves others as if they were nothing."""
    spoilt = tmp_path / "spoilt"
    shutil.copytree(adapter, spoilt)
    change, said = WRONG[what]
    change(spoilt)
    with pytest.raises(NvilaError, match=said) as refused:
        options({"a": str(spoilt)}, "tiny", _served())
    assert isinstance(refused.value, ConfigError | DataError) and str(spoilt) in str(refused.value)


def test_adapters_are_named_by_options(adapter: Path) -> None:
    """A name that is the model's would be answered by one of the two."""
    settings = settings_of([f"adapters={{a: {adapter}, b.2: {adapter}}}"])
    found = options(settings.adapters, "tiny", _served())
    assert found[:5] == ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"]
    assert found[-2:] == [f"a={adapter}", f"b.2={adapter}"]
    assert options({}, "tiny", _served()) == []
    with pytest.raises(ConfigError, match="own name"):
        options(settings.adapters, "a", _served())
    with pytest.raises(ConfigError, match="adapters"):
        settings_of([f"adapters={{-x: {adapter}}}"])


@pytest.mark.turns(3, 2)
@WITH_VLLM[0]
@WITH_VLLM[1]
def test_each_name_is_answered_by_its_own_weights(tmp_path: Path) -> None:
    """An adapter that is loaded and not applied answers as the model without it, and nobody notices."""
    torch.set_num_threads(1)
    decoder, tuned, tokenizer = _adapted()
    decoder.save_pretrained(tmp_path / "adapter")
    tuned.llm = decoder.merge_and_unload()
    model, _ = servable_model()
    write_serving(model, tokenizer, tmp_path / "model", dtype=torch.float32)
    shown = picture(tmp_path / "shown.png", 3)
    asked = Turn("human", "<image>\nWhich digit?")
    prompt = make_prompt([asked], [load_image(shown)], model.config)
    expected = {
        name: generate(each.eval(), tokenizer, [prompt], 8)[0] for name, each in (("tiny", model), ("tuned", tuned))
    }
    assert expected["tiny"] != expected["tuned"]

    settings = EndpointSettings(adapters={"tuned": str(tmp_path / "adapter")})
    given = {"served_name": "tiny", "log_path": tmp_path / "log", "settings": settings}
    started = server.start(tmp_path / "model", port=free_port("127.0.0.1"), **given)
    try:
        server.wait_ready(started.url, 240, started.pid, tmp_path / "log")
        (message,) = messages_of([asked], [("image", shown)])
        for _ in range(2):
            for name, answer in expected.items():
                assert server.ask(started.url, name, message.parts, max_tokens=8).text == answer
    finally:
        server.stop(started.pid)
