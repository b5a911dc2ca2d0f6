"""Damaged checkpoints of every layout: a changing few of the whole matrix, and those that no bound may let through."""

import os
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import damages
import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.foreign import parse
from nvila.components.model.text.jinja import read_template

FEW = 6
ALWAYS = (
    "native/config.json: a pipe",
    "native/llm/config.json: a device",
    "hf/config.json: huge",
    "serving/config.json: a pipe",
    "serving/chat_template.jinja: huge",
    "native/llm/tokenizer_config.json: chat_template doubles",
    "native/llm/tokenizer_config.json: chat_template loops",
)
"""Damages that were waited for, or read, without end."""


@pytest.fixture(scope="module")
def toys() -> Iterator[dict[str, Path]]:
    home = {name: os.environ.get(name) for name in ("HOME", "HF_HUB_OFFLINE")}
    with tempfile.TemporaryDirectory() as folder:  # others may look into it, as they may not into pytest's
        made = damages.prepare(Path(folder))
        for name, value in home.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        yield made


@pytest.fixture
def work(toys: dict[str, Path]) -> Path:
    return toys["native"].parent.parent / "work"


def test_a_damaged_checkpoint_is_refused_by_name_or_answers(toys: dict[str, Path], work: Path) -> None:
    """Prevents a damage from ending in a traceback, a process that waits for ever, or one that takes all memory."""
    seed = int(os.environ.get("DAMAGES", random.randrange(10**6)))
    every = [case for layout, toy in toys.items() for case in damages.cases(layout, toy, seed)]
    chosen = [case for case in every if case.name in ALWAYS] + random.Random(seed).sample(every, FEW)
    assert len(chosen) == len(ALWAYS) + FEW
    wrong = []
    for case in chosen:
        ends = damages.ends(case, {}, toys[case.layout], work)
        wrong += [(case.name, command, end) for command, end in ends.items() if end.how not in ("refused", "other")]
    assert not wrong, f"python tests/damages.py --seed {seed}: {wrong}"


@pytest.mark.parametrize(
    ("file", "key", "value", "says"),
    [
        ("llm/config.json", "num_hidden_layers", 10**9, "num_hidden_layers.*1000000000"),
        ("llm/config.json", "num_hidden_layers", 900, "the weights say 2"),
        ("vision_tower/config.json", "num_hidden_layers", 900, "the weights say 3"),
        ("vision_tower/config.json", "patch_size", 7, "the weights say 14"),
        ("llm/config.json", "hidden_size", 2**20, "the weights say 32"),
        ("config.json", "max_tiles", 10**9, "max_tiles.*above"),
        ("config.json", "num_video_frames", 10**9, "num_video_frames.*above"),
        ("config.json", "s2_scales", "28,2800000", "s2_scales"),
        ("mm_projector/config.json", "mm_projector_type", "mlp_downsample_3x3_fix", "another shape"),
    ],
)
def test_sizes_are_held_against_the_headers(
    toys: dict[str, Path], work: Path, file: str, key: str, value: object, says: str
) -> None:
    """Prevents loops and memory of a size that only a configuration names, and token counts of another model."""
    change = damages.Case("native", file, "", lambda path: damages.write_key(path, key, value))
    ended = damages.ends(change, {}, toys["native"], work, ["inspect"])
    for end in ended.values():
        assert end.how == "refused", end
        assert re.search(says, end.says), end.says


def test_labels_without_number_are_not_made(toys: dict[str, Path], work: Path) -> None:
    """Prevents a key that decides nothing from taking gigabytes, and from changing an answer."""
    sound = damages.results(toys["native"], work)
    keys = damages.Case("native", "llm/config.json", "", lambda path: damages.write_key(path, "num_labels", 10**9))
    assert {end.how for end in damages.ends(keys, sound, toys["native"], work).values()} == {"same"}


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', "[NaN]", "[-Infinity]", "[1e999]", "[" + "9" * 40 + "]", "[" * 70 + "]" * 70, "[" * 10**5],
)
def test_json_that_means_more_than_one_thing(text: str) -> None:
    """Prevents readers from taking different values out of one file."""
    with pytest.raises((ValueError, RecursionError)):
        parse(text)


def test_templates_without_end_are_refused() -> None:
    """Prevents the Jinja of a checkpoint from taking time or memory without end."""
    for template in ("x" * 2**19, "{{ 9 ** (9 ** 9) }}"):
        with pytest.raises(ConfigError, match="not Qwen2's"):
            read_template(template)
