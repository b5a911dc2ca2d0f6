"""Recipes and overrides as YAML 1.2: what a scalar is, and texts that are refused in words and in bounded time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.reader import file_document, layers, shipped_document
from nvila.components.contracts.recipe.yaml12 import MOST_BYTES, dump_yaml, load_yaml

LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("OFF", "OFF"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("2026-11-23", "2026-11-23"),
        ("0o17", 15),
        ("017", 17),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1e-3", 0.001),
        ("1e3", 1000),
        ("5.0E+7", 50_000_000),
        (".5", 0.5),
        ("+1", 1),
        ("<<", "<<"),
        ("=", "="),
        ("!!str 5", "5"),
        ("!!int 5", 5),
        ('{"a":1e3,"b":[NaN]}', {"a": 1000, "b": ["NaN"]}),
        ('"\\ud83d\\ude00"', "\U0001f600"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    """`batch: yes` trained with a batch of one, `1:30` was ninety, and `1e-3` a text that no learning rate takes."""
    found = load_yaml(text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text", ["yes", "1e-3", "0o17", "1_000", "1:30", "2026-11-23", "null", "<<", "=", "a b", "#", "1.", " ", "'", "\n"]
)
def test_what_is_written_is_read_again(text: str) -> None:
    """A recipe that is handed on whole would hold other values than the one that was checked."""
    assert load_yaml(dump_yaml({text: [text, 1e-5]})) == {text: [text, 1e-5]}


REFUSED = {
    "tag of another number": ("a: !!int abc", "line 1, column 4: 'abc' is no !!int"),
    "tag without a number": ("a: !!int ''", "'' is no !!int"),
    "tag of a float": ("!!float abc", "'abc' is no !!float"),
    "tag of a truth": ("!!bool maybe", "'maybe' is no !!bool"),
    "tag of a set": ("!!set [a]", "no values of the type !!set"),
    "tag of a time": ("!!timestamp soon", "no values of the type !!timestamp"),
    "tag of Python": ("!!python/object/apply:os.system [id]", "no values of the type !!python"),
    "long tag": ("!" + "x" * 50_000 + " y", "50,001 characters"),
    "5,000 digits": ("seed: " + "9" * 5000, "a number of 5,000 characters"),
    "5,000 digits in JSON": ('{"seed": ' + "9" * 5000 + "}", "a number of 5,000 characters"),
    "5,000 digits of a fraction": ("seed: 0." + "9" * 5000, "a number of 5,002 characters"),
    "key twice": ("a: 1\nb: 2\na: 3", "line 3, column 1: the key a stands twice"),
    "key twice in JSON": ('{"a": 1, "a": 2}', "the key a stands twice"),
    "key that is no text": ("1: a", "the key 1 is no text"),
    "key that is a list": ("? [a]\n: b", "unhashable key"),
    "laughs": (LAUGHS, "more than 20,000 values"),
    "alias within itself": ("a: &a [*a]", "an alias within"),
    "merge": ("a: &a {b: 1}\nc: {!!merge <<: *a}", "no values of the type !!merge"),
    "long alias": ("*" + "x" * 50_000, "found undefined alias"),
    "deep lists": ("[" * 5000, "nested too deeply"),
    "deep JSON": ("[" * 30_000 + "]" * 30_000, "nested too deeply"),
    "deep blocks": ("- " * 5000, "nested too deeply"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
    "tab": ("\ta: 1", "cannot start any token"),
    "NUL": ("a: b\0c", "unacceptable character #x0000"),
    "NUL by its escape": ('a: "b\\0c"', "U+0000"),
    "half a character": ('{"a": "\\ud800"}', "U+D800"),
    "no such character": ('a: "\\U00110000"', "chr"),
    "version of 5,000 digits": ("%YAML " + "9" * 5000 + ".1\n---\na", "digits"),
    "too long": ("a: " + "x" * MOST_BYTES, "longer than 65,536 bytes"),
}


@pytest.mark.parametrize(("text", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_recipe_is_refused_in_words(text: str, words: str) -> None:
    """Each of them ended in a traceback, in a message of megabytes, or not at all."""
    with pytest.raises(ValueError) as caught:
        load_yaml(text)
    assert words in str(caught.value) and len(str(caught.value)) < 500


def test_no_text_ends_in_another_error() -> None:
    """Whatever is broken off, doubled or put into a recipe, its reader is told in words; the seed names the text."""
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    signs = [
        *"[]{}&*!|>%@`'\":,?-#\t\n\0\\",
        "<<: ",
        "!!int ",
        "\ufeff",
        "\u2028",
        "\ud800",
        "&a ",
        "*a",
        "---\n",
        "9" * 99,
    ]
    whole = shipped_document("micro").text
    for attempt in range(60):
        text = whole
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(text))
            end = draw.choice([at, at + 1, len(text)])
            text = text[:at] + "".join(draw.choices(signs, k=draw.randint(1, 3))) + text[end:]
        try:
            load_yaml(text)
        except ValueError:
            continue
        except Exception as error:
            pytest.fail(f"seed {seed}, text {attempt}: {type(error).__name__}: {error}")


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    """A pipe is waited for without end, a folder or another encoding was a traceback."""
    import os

    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "zeros.yaml").symlink_to("/dev/zero")
    (tmp_path / "large.yaml").write_bytes(b"# " + b"x" * 10**7)
    (tmp_path / "utf16.yaml").write_text("extends: micro", encoding="utf-16")
    (tmp_path / "latin.yaml").write_text("name: mïcro", encoding="latin-1")
    for name, words in {
        "pipe": "not a file",
        "folder": "not a file",
        "zeros": "not a file",
        "large": "at most 65,536 bytes",
        "utf16": "is UTF-16",
        "latin": "not UTF-8 at byte 7",
        "a\0b": "no such recipe file",
        "x" * 300: "File name too long",
        "y" * 5000: "File name too long",
    }.items():
        with pytest.raises(ConfigError, match=words) as caught:
            file_document(tmp_path / f"{name}.yaml")
        assert len(str(caught.value)) <= 1500


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path) -> None:
    """Editors of Windows write one."""
    (tmp_path / "mine.yaml").write_text("extends: micro\r\nseed: 3\r\n", encoding="utf-8-sig", newline="")
    assert layers(file_document(tmp_path / "mine.yaml")).recipe().seed == 3
