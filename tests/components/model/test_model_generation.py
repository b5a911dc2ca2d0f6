from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.model.decode.answer import generate, stream
from nvila.components.model.decode.generation import Sampling, nucleus, text_pieces
from nvila.components.model.nvila import NVILA
from nvila.components.model.text.conversation import Turn, render, split_media
from nvila.components.model.text.prompt import make_prompt

Picture = Callable[..., Image.Image]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.5, "top_p": 0.6}])
def test_streamed_equals_whole(model: NVILA, tokenizer: Any, picture: Picture, options: dict[str, Any]) -> None:
    """Prevents a stream that loses, doubles or reorders text, for greedy and sampled answers."""
    frames = [picture(seed=i) for i in range(3)]
    dialogue = [Turn("human", "<image>\nWhich <vila/video> digit?"), Turn("gpt", "four"), Turn("human", "And?")]
    for turns, media in ((dialogue[:1], [picture()]), (dialogue, [picture(), frames]), (dialogue[2:], [])):
        prompt = make_prompt(turns, media, model.config)
        (whole,) = generate(model, tokenizer, [prompt], 24, **options)
        pieces = list(stream(model, tokenizer, prompt, 24, **options))
        assert "".join(pieces) == whole and all(pieces)
        assert len(pieces) > 1 or not options  # the greedy answer of random weights may be empty


@given(st.text(alphabet="aé東京 \n\t🙂\ufffd", max_size=12))
@settings(deadline=None)
def test_pieces_join_to_the_stripped_text(tokenizer: Any, text: str) -> None:
    """Prevents half characters and lost or added white space, whatever the answer."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = list(text_pieces(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert all(pieces)


def test_a_piece_never_ends_in_half_a_character(tokenizer: Any) -> None:
    """Prevents replacement signs that flash up in a terminal and stay."""
    ids = tokenizer("a東b", add_special_tokens=False)["input_ids"]
    assert len(ids) > 3  # the character is several tokens
    assert not [piece for piece in text_pieces(tokenizer, ids) if "\ufffd" in piece]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any), st.floats(0.01, 0.999))
@example([2, 7, 9], 0.5)
@settings(deadline=None)
def test_nucleus(weights: list[int], top_p: float) -> None:
    """Prevents a set that is too small or too large, or an empty one, against a literal loop over the same sums."""
    probabilities = np.array(weights, dtype=np.float64) / sum(weights)
    kept = nucleus(torch.tensor(probabilities)[None], top_p)[0].numpy()
    total, expected = 0.0, np.zeros(len(weights))
    for index in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        if total < top_p:
            expected[index] = probabilities[index]
        total += probabilities[index]
    assert kept.tolist() == expected.tolist()


def test_a_tiny_nucleus_is_greedy(model: NVILA, tokenizer: Any, picture: Picture) -> None:
    """Prevents top_p from being ignored."""
    prompt = make_prompt([Turn("human", "Which?")], [picture()], model.config)
    greedy = generate(model, tokenizer, [prompt], 16)
    assert generate(model, tokenizer, [prompt], 16, temperature=5.0, top_p=1e-6) == greedy
    assert generate(model, tokenizer, [prompt], 16, temperature=5.0) != greedy


@pytest.mark.parametrize("wrong", [{"top_p": 0.0}, {"top_p": 1.2}, {"temperature": -1.0}])
def test_wrong_sampling(wrong: dict[str, float]) -> None:
    """Prevents nonsense from being sampled without a word."""
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(4, frozenset({0}), **wrong)  # type: ignore[arg-type]


def test_a_prompt_beyond_the_decoder_is_refused(model: NVILA, tokenizer: Any) -> None:
    """Prevents nonsense from positions that the decoder was never trained for."""
    most = model.llm.config.max_position_embeddings
    prompt = make_prompt([Turn("human", "9 " * most)], [], model.config)
    with pytest.raises(DataError, match=f"too long.*{most} positions"):
        generate(model, tokenizer, [prompt], 4)


def test_an_answer_ends_where_the_positions_do(model: NVILA, tokenizer: Any) -> None:
    """Prevents other answers in evaluation than at the endpoint, which stops there; each row of a batch has its end."""
    most = model.config.positions
    short, long = (make_prompt([Turn("human", "9" * n)], [], model.config) for n in (1, most - 25))
    left = most - len(long.encode(tokenizer, generate=True).input_ids)
    assert 0 < left < 25
    whole, cut = (generate(model, tokenizer, [prompt], 40, temperature=5.0) for prompt in (short, long))
    assert generate(model, tokenizer, [short, long], 40)[0] == generate(model, tokenizer, [short], 40)[0]
    assert (
        generate(model, tokenizer, [long], left, temperature=5.0) == cut != generate(model, tokenizer, [long], left - 1)
    )
    assert whole and "".join(stream(model, tokenizer, long, 40, temperature=5.0)) == cut[0]


def test_media_without_a_place_come_first(configure: Any, picture: Picture) -> None:
    """Prevents tiles of one picture from standing where another belongs when only some have a place in the text."""
    turns = [Turn("human", "A <image> B"), Turn("gpt", "<image>"), Turn("human", "C <vila/video>")]
    assert split_media(turns, "abc") == (["a"], ["b", "c"]) and split_media(turns, "a") == ([], ["a"])
    config = configure(vision_mode="dynamic")
    prompt = make_prompt([Turn("human", "see <image> there")], [picture(84, 56), picture()], config, tile_all=True)
    tiles = len(prompt.visuals)
    assert tiles > 3
    text = render(prompt.turns, markers=prompt.markers)
    first, second = prompt.markers
    assert f"user\n{first}see {second}" in text
    assert first.count("<image>") + second.count("<image>") == tiles


def test_system_prompt_of_a_prompt(tokenizer: Any, configure: Any) -> None:
    """Prevents a system prompt that a caller asks for from being dropped."""
    prompt = make_prompt([Turn("human", "Why?")], [], configure(), system="Be brief")
    assert "system\nBe brief<|im_end|>" in tokenizer.decode(prompt.encode(tokenizer, generate=True).input_ids)
