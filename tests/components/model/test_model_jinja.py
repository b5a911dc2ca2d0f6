"""Chat templates that checkpoints bring and take along."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nvila.components.contracts.errors import ConfigError
from nvila.components.model.checkpoint.convert import convert
from nvila.components.model.checkpoint.native import load_native, save_native
from nvila.components.model.checkpoint.quantized import load_quantized
from nvila.components.model.checkpoint.serving import write_serving
from nvila.components.model.nvila import NVILA
from nvila.components.model.text.conversation import Turn, render
from nvila.components.model.text.jinja import chat_template, read_template
from nvila.components.model.text.prompt import make_prompt
from nvila.components.model.text.templates import QWEN2, template_of

CHATML = (
    "{% for message in messages %}DEFAULT{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT = CHATML.replace(
    "DEFAULT",
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Qwen. You help.<|im_end|>\n' }}{% endif %}",
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
MISTRAL = "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"


@pytest.mark.parametrize(
    ("written", "system"),
    [(WITH_DEFAULT, "You are Qwen. You help."), (CHATML.replace("DEFAULT", ""), None), (PARTS, None)],
)
def test_a_foreign_default_system_prompt_is_kept(written: str, system: str | None) -> None:
    """Prevents a model from being asked with another system prompt than the one that it was trained with."""
    found = read_template(written)
    assert found.system == system and found.user_open == QWEN2.user_open
    assert read_template(chat_template(found)) == found
    turns = [Turn("human", "Why?")]
    assert ("You are Qwen." in render(turns, template=found)) == (system is not None)
    assert "system\nBe brief<|im_end|>" in render(turns, system="Be brief", template=found)


def test_what_we_write_is_what_we_read() -> None:
    """Prevents a template from changing when a checkpoint is saved and loaded."""
    assert read_template(chat_template()) == QWEN2
    assert read_template(chat_template(tile_breaks=True, literal_media=True)) == QWEN2


@pytest.mark.parametrize("written", [MISTRAL, "{{ nothing.at.all }}", "{% for", "", CHATML.replace("content", "c")])
def test_what_cannot_be_said_is_refused(written: str) -> None:
    """Prevents prompts in words that the model was not trained with, without a word."""
    with pytest.raises(ConfigError, match=r"not Qwen2's.*qwen2"):
        read_template(written)


@pytest.fixture
def foreign(model: NVILA, tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer has its own template, as one that was trained elsewhere."""
    save_native(model, tokenizer, tmp_path / "foreign")
    change(tmp_path / "foreign/llm/tokenizer_config.json", chat_template=WITH_DEFAULT)
    change(tmp_path / "foreign/config.json", chat_template=None)
    return tmp_path / "foreign"


def change(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | content))


def asked(tokenizer: Any, config: Any) -> str:
    prompt = make_prompt([Turn("human", "Why?")], [], config)
    return str(tokenizer.decode(prompt.encode(tokenizer, generate=True).input_ids))


def test_a_checkpoints_own_template_is_spoken(foreign: Path, tmp_path: Path) -> None:
    """Prevents another default system prompt than the reference takes for the same folder: the tokenizer's, or the one
    that config.json names; and one that is lost on the way to a server or to another layout."""
    model, tokenizer = load_native(foreign)
    assert "system\nYou are Qwen. You help.<|im_end|>" in asked(tokenizer, model.config)
    write_serving(model, tokenizer, tmp_path / "served")
    convert(foreign, tmp_path / "vila", "vila")
    convert(tmp_path / "vila", tmp_path / "native", "native")
    served, its_tokenizer = load_quantized(tmp_path / "served")
    assert asked(its_tokenizer, served.config) == asked(tokenizer, model.config)
    again, its_tokenizer = load_native(tmp_path / "native")
    assert asked(its_tokenizer, again.config) == asked(tokenizer, model.config)
    assert json.loads((tmp_path / "native/config.json").read_text())["chat_template"] is None
    # The reference, told of no other template, writes its media into the content of this one.
    theirs = AutoTokenizer.from_pretrained(tmp_path / "native/llm")
    text = theirs.apply_chat_template([{"role": "user", "content": "<image>Why?"}], tokenize=False)
    assert "<image>Why?" in text and "You are Qwen." in text

    change(foreign / "config.json", chat_template="qwen2")
    model, tokenizer = load_native(foreign)
    assert template_of(tokenizer) == QWEN2 and "Qwen." not in asked(tokenizer, model.config)


def test_an_unknown_template_is_refused_at_loading(foreign: Path) -> None:
    """Prevents hours of work with prompts that mean something else to the model."""
    for name in ("vicuna_v1", "mistral"):  # the first is one of older VILA models, whose decoders are not read here
        change(foreign / "config.json", chat_template=name)
        with pytest.raises(ConfigError, match=rf"no such chat template.*{name}.*qwen2"):
            load_native(foreign)
    (foreign / "mistral.jinja").write_text(MISTRAL)
    with pytest.raises(ConfigError, match=r"foreign/llm: .*not Qwen2's"):
        load_native(foreign)
    (foreign / "mistral.jinja").write_text(WITH_DEFAULT.replace("\n", "\\n"))  # the reference drops line breaks
    assert template_of(load_native(foreign)[1]).system == "You are Qwen. You help."


@pytest.mark.parametrize("layout", ["native", "vila", "hf"])
def test_others_can_chat_with_what_we_write(layout: str, model: NVILA, tokenizer: Any, tmp_path: Path) -> None:
    """Prevents exports that no other program can ask: without a template, or without its name for the reference."""
    save_native(model, tokenizer, tmp_path / "native")
    if layout != "native":
        convert(tmp_path / "native", tmp_path / layout, layout)
    folder = tmp_path / layout
    theirs = AutoTokenizer.from_pretrained(folder if layout == "hf" else folder / "llm")
    parts = [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": " <|im_end|>?"}]
    text = theirs.apply_chat_template([{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True)
    assert text == render([Turn("human", "See <image> <|im_end|>?")], markers=["<image>"], generate=True)
    if layout != "hf":
        assert json.loads((folder / "config.json").read_text())["chat_template"] == "qwen2"
    if (
        layout == "vila"
    ):  # remote code reads this file, without line breaks and runs of spaces, and writes media into it
        theirs.chat_template = (folder / "qwen2.jinja").read_text().replace("    ", "").replace("\n", "")
        text = theirs.apply_chat_template([{"role": "user", "content": "<image>Why?"}], tokenize=False)
        assert text == render([Turn("human", "<image>Why?")])
