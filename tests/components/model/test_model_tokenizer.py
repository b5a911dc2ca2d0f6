import json
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.model.text.conversation import Turn, encode
from nvila.components.model.text.tokenizer import SPECIAL, TokenIds, load_tokenizer, save_tokenizer, train_tokenizer

TEXTS = ["Which digit is in row 2?", "12345 naïve café 東京 🎈\n\t x", "<|im_start|>user\nhi<|im_end|>\n<image>"]


def test_ids_follow_the_published_order(tokenizer: Any) -> None:
    """Prevents ids that differ from a published tokenizer's order: specials, sentinel, image, video."""
    start = len(tokenizer) - 8
    names = [*SPECIAL, "<vila/sentinel>", "<image>", "<vila/video>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(start, len(tokenizer)))
    ids = TokenIds.of(tokenizer)
    assert (ids.vocabulary, ids.image, ids.video) == (start + 5, start + 6, start + 7)
    assert tokenizer.decode([ids.newline]) == "\n" and ids.end == tokenizer.eos_token_id


def test_digits_are_split_and_texts_come_back(tokenizer: Any) -> None:
    """Prevents multi-digit tokens, and text that byte-level coding cannot return."""
    assert len(tokenizer("12345", add_special_tokens=False)["input_ids"]) == 5
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_vocabulary_is_bounded() -> None:
    """Prevents a vocabulary larger than the decoder was told, and a cryptic failure below the bytes."""
    assert len(train_tokenizer(["abc abc abcd " * 50], 264)) - 3 <= 264
    with pytest.raises(ConfigError, match="261"):
        train_tokenizer(["abc"], 200)


def test_template_is_short() -> None:
    """Prevents prompts whose constant part, spelt in bytes, costs more than the question."""
    tokenizer = train_tokenizer(["Which digit is in row 2?"] * 9, 400)
    ids = encode(tokenizer, [Turn("human", "Which digit is in row 2?")], generate=True).input_ids
    assert len(ids) < 32


def test_save_and_load(tokenizer: Any, tmp_path: Path) -> None:
    """Prevents media markers from leaking into a saved vocabulary, or ids from moving over generations."""
    save_tokenizer(tokenizer, tmp_path / "a", 256)
    again = load_tokenizer(tmp_path / "a")
    save_tokenizer(again, tmp_path / "b", 256)
    for path in (tmp_path / "a").iterdir():
        text = path.read_text()
        if path.name == "tokenizer_config.json":  # whose chat template knows them
            text = json.dumps(json.loads(text) | {"chat_template": None})
        assert "<image>" not in text and "vila/" not in text
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert TokenIds.of(again) == TokenIds.of(tokenizer)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_loads_the_files_of_published_checkpoints(tokenizer: Any, tmp_path: Path) -> None:
    """Prevents published checkpoints, which carry vocab.json and merges.txt only, from getting other ids."""
    save_tokenizer(tokenizer, tmp_path, 256)
    (tmp_path / "tokenizer.json").unlink()
    again = load_tokenizer(tmp_path)
    assert TokenIds.of(again) == TokenIds.of(tokenizer)
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_missing_or_broken(tmp_path: Path) -> None:
    """Prevents a traceback, or a download attempt, for a folder without a tokenizer."""
    with pytest.raises(DataError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        load_tokenizer(tmp_path)
