from typing import Any

import pytest

from nvila.components.contracts.errors import DataError
from nvila.components.model.text.conversation import Message, Place, Turn, arranged, encode, messages_of, render
from nvila.components.model.text.prompt import make_prompt
from nvila.components.model.vision.preprocess import preprocess_image

DIALOGUE = [
    Turn("human", "<image>\nIs the circle red?"),
    Turn("gpt", "yes\n\nno\n three"),
    Turn("human", " and now? "),
    Turn("gpt", "four"),
]


def test_template() -> None:
    """Prevents another default system prompt or white space than the decoder was trained with."""
    assert render(DIALOGUE) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        "<|im_start|>user\n<image>Is the circle red?<|im_end|>\n"
        "<|im_start|>assistant\nyes\n\nno\n three<|im_end|>\n"
        "<|im_start|>user\nand now?<|im_end|>\n"
        "<|im_start|>assistant\nfour<|im_end|>\n"
    )
    assert render(DIALOGUE[:1], system="", generate=True) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<image>Is the circle red?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_labels_are_the_answers_and_their_ends(tokenizer: Any) -> None:
    """Prevents the reference's defect: in a multi-line answer a line break lost and one after the end supervised."""
    encoded = encode(tokenizer, DIALOGUE)
    supervised = [i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label != -100]
    assert all(label in (-100, i) for i, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert tokenizer.decode(supervised) == "yes\n\nno\n three<|im_end|>four<|im_end|>"
    after = [encoded.labels[k + 1] for k, label in enumerate(encoded.labels) if label == tokenizer.eos_token_id]
    assert after == [-100, -100]


@pytest.mark.parametrize("answer", ["yes", "", "  naïve\n\n\ncafé ", "'s 42 != 7\t.", "e\u0301", "\n\nx"])
def test_pieces_tokenize_like_the_whole(tokenizer: Any, answer: str) -> None:
    """Prevents tokens at the edges of answers that the decoder would never see in the whole text."""
    turns = [Turn("human", "Which?"), Turn("gpt", answer), Turn("human", "Why?"), Turn("gpt", "4")]
    whole = tokenizer(render(turns), add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, turns).input_ids == whole


def test_each_medium_is_one_token(tokenizer: Any) -> None:
    """Prevents a marker that is cut into text tokens and never replaced."""
    ids = encode(tokenizer, [Turn("human", "<image><vila/video>\nWhat?")], generate=True).input_ids
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<vila/video>"])
    assert ids.count(image) == 1 and ids[ids.index(image) + 1] == video
    assert tokenizer.decode(ids).endswith("What?<|im_end|>\n<|im_start|>assistant\n")


def test_media_are_placed() -> None:
    """Prevents users' interleaved prompts from breaking: literals say where media stand, as far as there are any."""
    turns = [Turn("human", "<image>\nA <image> or <image>? <vila/sentinel>"), Turn("gpt", "<image>yes")]
    question, answer = messages_of(turns, ["first", "second"])
    assert [part.medium if isinstance(part, Place) else part for part in question.parts] == [
        "", "first", "\nA ", "second", " or ", "<image>", "? <vila/sentinel>",
    ]  # fmt: skip
    assert answer == Message("assistant", ("<image>yes",))
    bare = Turn("human", " What?\n")
    assert messages_of([bare], ["a", "b"]) == [Message("user", (Place("a"), Place("b"), "What?"))]
    assert "user\n<image>\n<image>\nWhat?<|im_end|>" in render([bare], markers=["<image>\n<image>\n"])
    behind = Turn("human", "<image>\nWhat?")
    assert "user\n<vila/video>What?<|im_end|>" in render([behind], markers=["<vila/video>"])
    assert "user\n<\u200bimage>\nWhat?<|im_end|>" in render([behind], markers=[])
    with pytest.raises(DataError):
        render([Turn("gpt", "x")], markers=["<image>"])
    with pytest.raises(DataError, match="role"):
        render([Turn("system", "x")])


def test_a_question_of_media_only_ends_behind_them() -> None:
    """Prevents a line break behind the last tile where the reference, which strips the whole message, has none."""
    for question in ("", "<image>", "<image>\n", "\n"):
        text = render([Turn("human", question)], markers=["<image>\n" * 3])
        assert "user\n<image>\n<image>\n<image><|im_end|>" in text


def test_prompt_markers_match_visuals(configure: Any, picture: Any, tokenizer: Any) -> None:
    """Prevents a prompt whose markers and visuals differ in number, in each vision mode and for several pictures."""
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<vila/video>"])
    media = [picture(84, 56), [picture(seed=i) for i in range(4)], picture(30, 90)]
    for mode in ("resize", "dynamic", "s2", "dynamic_s2"):
        for tile_all in (False, True):
            for count in (1, 3):
                config = configure(vision_mode=mode)
                prompt = make_prompt([Turn("human", "Hm?")], media[:count], config, tile_all=tile_all)
                ids = prompt.encode(tokenizer).input_ids
                kinds = [visual.kind for visual in prompt.visuals]
                assert [{image: "image", video: "video"}[i] for i in ids if i in (image, video)] == kinds
    tiled = make_prompt([Turn("human", "<image>\nHm?")], media[:1], configure(vision_mode="dynamic"))
    assert "user\n" + "<image>\n" * 7 + "Hm?" in render(tiled.turns, markers=tiled.markers)


@pytest.mark.parametrize("mode", ["dynamic", "dynamic_s2"])
def test_a_clip_beside_a_picture_leaves_it_tiled(configure: Any, picture: Any, mode: str) -> None:
    """Prevents answers of `nvila infer` from differing from the endpoint's, which counts pictures, as the reference."""
    config, clip = configure(vision_mode=mode), [picture(seed=i) for i in range(4)]
    tiles = [visual.tiles.shape for visual in preprocess_image(picture(84, 56), config)]
    for media in ([picture(84, 56), clip], [clip, picture(84, 56)]):
        prompt = make_prompt([Turn("human", "Hm?")], media, config)
        assert [visual.tiles.shape for visual in prompt.visuals if visual.kind == "image"] == tiles


@pytest.mark.parametrize(
    ("question", "given", "expected"),
    [
        ("<vila/video>, then <image>", ["i1", "v1"], ["v1", "i1"]),
        ("<image> or <vila/video>", ["v1", "i1", "i2", "v2"], ["v1", "i1", "i2", "v2"]),
        ("<vila/video> or <image>", ["i1", "i2", "v1"], ["i1", "v1", "i2"]),
        ("Which?", ["v1", "i1"], ["v1", "i1"]),
        ("<image> or <image>", ["i1"], ["i1"]),
        ("<vila/video>", [], []),
        ("<vila/video>", ["i1"], None),
        ("<image> <image> <vila/video>", ["i1", "v1"], None),
    ],
)
def test_a_place_is_for_a_medium_of_its_kind(question: str, given: list[str], expected: list[str] | None) -> None:
    """Prevents a picture from standing where the question speaks of a clip, because it was named first."""
    turns = [Turn("human", question), Turn("gpt", "<image>")]
    media: list[Any] = [({"i": "image", "v": "video"}[name[0]], name) for name in given]
    if expected is None:
        with pytest.raises(DataError, match="has a place for a medium of kind"):
            arranged(turns, media)
    else:
        assert arranged(turns, media) == expected
