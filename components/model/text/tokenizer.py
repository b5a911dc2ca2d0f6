"""Tokenizers: training a small one of Qwen2's kind, loading, saving, and the ids the model needs.

The media markers exist at run time only: `with_markers` adds them after the saved tokens and `save_tokenizer` leaves
them out, so that a checkpoint's vocabulary stays the decoder's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.foreign import read_object, read_text, reading
from nvila.components.model.config.config import LINE_BREAK_AFTER
from nvila.components.model.text.controls import IMAGE_TOKEN, MARKERS, SPECIAL, VIDEO_TOKEN, control_strings
from nvila.components.model.text.jinja import REFERENCE_NAME, chat_template, named_template
from nvila.components.model.text.templates import QWEN2, SYSTEM, template_of
from nvila.components.model.text.timetokens import add_time_tokens, time_token_ids

FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What transformers opens of a tokenizer of Qwen2's kind."""
TEMPLATE = f"system\n{SYSTEM}\nuser\nassistant\n"
"""Words of the chat template."""


@dataclass(frozen=True)
class TokenIds:
    """Ids the model itself needs to know."""

    vocabulary: int
    """Number of saved tokens; the markers' ids start here."""
    image: int
    video: int
    newline: int
    end: int
    pad: int
    video_marks: tuple[tuple[int, ...], ...] | None = None
    """Tokens of the configuration's `video_texts`; None for a line break behind each frame."""
    time: tuple[int, ...] = ()
    """Ids of the time tokens `<t0>`, `<t1>`, ... that the saved vocabulary has."""

    @classmethod
    def of(cls, tokenizer: Any, video_texts: Sequence[str] = LINE_BREAK_AFTER) -> TokenIds:
        """The ids in a tokenizer that has the media markers.

        Args:
            tokenizer: loaded by `load_tokenizer` or made by `train_tokenizer`.
            video_texts: as in the configuration.

        Raises:
            ConfigError: a token is missing, or a line break is not one token.
        """
        ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (*MARKERS, "<|im_end|>")}
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        missing = [name for name, number in ids.items() if number is None]
        if missing or len(newline) != 1 or tokenizer.pad_token_id is None:
            raise ConfigError(
                "the tokenizer is not of Qwen2's kind: it needs <|im_end|>, a padding token and a one-token line break",
                value=missing or newline,
            )
        start = len(tokenizer) - len(MARKERS)
        if sorted(ids.values())[-len(MARKERS) :] != list(range(start, len(tokenizer))) or ids["<|im_end|>"] >= start:
            raise ConfigError("the media markers are not the last tokens", value=ids, do="Load it with load_tokenizer")
        marks = None
        if tuple(video_texts) != LINE_BREAK_AFTER:
            marks = tuple(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in video_texts)
        return cls(
            start,
            ids[IMAGE_TOKEN],
            ids[VIDEO_TOKEN],
            newline[0],
            ids["<|im_end|>"],
            tokenizer.pad_token_id,
            marks,
            time_token_ids(tokenizer),
        )


def load_tokenizer(folder: Path | str, checkpoint: Path | str | None = None, time_tokens: int = 0) -> Any:
    """A saved tokenizer with the media markers added behind its tokens. No code of the folder runs.

    Args:
        folder: where it lies.
        checkpoint: folder whose config.json may name another chat template than the tokenizer's own (`chat_template`).
        time_tokens: how many to add behind its tokens.

    Raises:
        DataError: the folder holds no readable tokenizer.
        ConfigError: a chat template that is not known here (`templates.template_of`).
    """
    folder = Path(folder)
    with reading(folder):
        require_files(folder)
        tokenizer = _loaded(folder)
        if checkpoint is not None and (name := read_object(Path(checkpoint) / "config.json").get("chat_template")):
            tokenizer.chat_template = named_template(str(name), Path(checkpoint))
        try:
            template_of(tokenizer)
        except ConfigError as error:  # now, not at the first question
            raise ConfigError(error.what, where=str(folder), value=error.value, do=error.do) from None
        if time_tokens:
            add_time_tokens(tokenizer, time_tokens)
        return with_markers(tokenizer)


def require_files(folder: Path) -> None:
    """Raises:
    DataError: no tokenizer, or a file of it is not one to read.
    """
    if not os.path.lexists(folder / FILES[0]):
        raise DataError("no tokenizer here", where=str(folder), do="A checkpoint keeps it in llm/")
    for path in (folder / name for name in FILES):
        if os.path.lexists(path):
            (read_object if path.suffix == ".json" else read_text)(path)


def _loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer, Qwen2Config

    try:
        # The config only spares transformers a look at the folder's own, whose type in serving form it does not know.
        tokenizer = AutoTokenizer.from_pretrained(
            folder, config=Qwen2Config(), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("the tokenizer cannot be read", where=str(folder), value=str(error)) from None
    ids = tokenizer.get_vocab().values()
    if not ids or len(set(ids)) != len(ids) or max(ids) != len(ids) - 1:
        raise DataError("its ids are not 0, 1, 2, ... without a gap", where=str(folder / "tokenizer.json"))
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def with_markers(tokenizer: Any) -> Any:
    """Add the media markers to a tokenizer, in place."""
    tokenizer.add_tokens(list(MARKERS), special_tokens=True)
    tokenizer.padding_side = "right"
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with Qwen2's normaliser, pre-tokenizer (digits one by one) and special tokens.

    Args:
        texts: what it learns its merges from. The template's words count as often as there are texts: they are in
            every prompt, and would be single bytes otherwise.
        vocabulary: most tokens, special ones included; at least 256 bytes and the special tokens.

    Returns:
        The tokenizer with the media markers, whose ids lie behind the vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    least = 256 + len(SPECIAL)
    if vocabulary < least:
        raise ConfigError(
            f"a byte-level vocabulary needs at least {least} tokens", where="vocabulary", value=vocabulary
        )
    empty = Qwen2Tokenizer().backend_tokenizer
    raw = Tokenizer(models.BPE())
    raw.normalizer, raw.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    # Qwen2Tokenizer takes pairs and no unknown token, which its annotations do not say.
    make: Any = Qwen2Tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(chain.from_iterable((text, TEMPLATE) for text in texts), trainer)
    learnt = json.loads(raw.to_str())["model"]
    tokenizer = make(vocab=learnt["vocab"], merges=[tuple(m) for m in learnt["merges"]], unk_token=None)
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token = "<|im_end|>", "[PAD]", "[BOS]"
    return with_markers(tokenizer)


def save_tokenizer(tokenizer: Any, folder: Path, max_length_tokens: int) -> None:
    """Write a tokenizer without the media markers: `tokenizer.json` and the files of the reference's layout.

    The chat template is one of the settings: the transformers of the reference reads no file of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    content = _read(folder / "tokenizer.json")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in MARKERS]
    _write(folder / "tokenizer.json", content)
    _write(folder / "vocab.json", content["model"]["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    _write(folder / "added_tokens.json", {token["content"]: token["id"] for token in content["added_tokens"]})
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    _write(folder / "special_tokens_map.json", names)
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    decoder = {str(token["id"]): {name: token[name] for name in fields} for token in content["added_tokens"]}
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "added_tokens_decoder": decoder,
            **names,
            "unk_token": None,
            "errors": "replace",
            "split_special_tokens": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length_tokens,
            "padding_side": "right",
            "chat_template": written_template(tokenizer, literal_media=template_name(tokenizer) is None),
        },
    )


def written_template(tokenizer: Any, *, tile_breaks: bool = False, literal_media: bool = False) -> str:
    """The tokenizer's chat template as we write it, with all its control strings broken up; see `jinja`."""
    return chat_template(
        template_of(tokenizer), control_strings(tokenizer), tile_breaks=tile_breaks, literal_media=literal_media
    )


def template_name(tokenizer: Any) -> str | None:
    """`chat_template` of a config.json: the reference's name, or None where it has to take the tokenizer's own."""
    return REFERENCE_NAME if template_of(tokenizer) == QWEN2 else None


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
