"""What a model is shown: the picture asked about, a blank one, or another sample's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvila.components.data.samples import Sample, read_samples
from nvila.components.metrics.answers import Questions, _displaced, answers
from nvila.components.model.checkpoint.native import load_native
from nvila.components.model.feed import Feed
from nvila.components.model.vision.preprocess import normalise


@pytest.fixture
def prepared(small: Any) -> Callable[[str], Questions]:
    model, tokenizer = load_native(small.model.dir("model"))
    feed = Feed(tokenizer, model.config)

    def prepare(source: str) -> Questions:
        samples = read_samples(small.samples.path("samples.parquet"), split="heldout", sources=[source])
        return Questions.prepare(samples, feed)

    return prepare


@pytest.mark.parametrize("source", ["colours", "clips"])
def test_a_blank_picture_shows_nothing(prepared: Callable[[str], Questions], source: str) -> None:
    """A baseline that still sees the picture, or sees another shape, is no baseline."""
    questions = prepared(source)
    blanks = [visual for prompt in questions.prompts("blank") for visual in prompt.visuals]
    owns = [visual for prompt in questions.prompts("own") for visual in prompt.visuals]
    assert len({visual.tiles.unique().tolist()[0] for visual in blanks}) == 1
    assert all(len(visual.tiles.unique()) == 1 for visual in blanks)
    assert float(normalise(blanks[0].tiles).abs().max()) < 0.01
    shapes = [[(v.kind, v.tiles.shape, v.block_size) for v in visuals] for visuals in (blanks, owns)]
    assert shapes[0] == shapes[1]
    assert all(len(visual.tiles.unique()) > 1 for visual in owns)


@pytest.mark.parametrize("source", ["colours", "clips"])
def test_another_picture_is_never_the_own_one(prepared: Callable[[str], Questions], source: str) -> None:
    """Two questions on one picture: the neighbour's picture may be the very same."""
    questions = prepared(source)
    for own, other in zip(questions.prompts("own"), questions.prompts("other"), strict=True):
        assert own.turns == other.turns
        pairs = zip(own.visuals, other.visuals, strict=True)
        assert not any(torch.equal(a.tiles, b.tiles) for a, b in pairs)


def test_displacement_finds_another_picture_where_there_is_one() -> None:
    """Long runs of one picture reach half the list and more; a single picture has no other."""
    runs = [("a",)] * 9 + [("b",)]
    assert all(own != other for own, other in zip(runs, _displaced(runs), strict=True))
    assert _displaced([("a",)] * 3) == [("a",)] * 3
    assert _displaced([]) == []


def test_only_the_question_is_put(prepared: Callable[[str], Questions]) -> None:
    """A prompt that holds the answer is answered perfectly."""
    questions = prepared("colours")
    for sample, prompt in zip(questions.samples, questions.prompts("own"), strict=True):
        assert [turn.text for turn in prompt.turns] == [sample.conversations[0].text]
        assert prompt.turns[0].role == "human"
    assert len(questions.prompts("own", 3)) == 3


def test_a_picture_is_decoded_once(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten questions a picture would mean ten decodings for each of six models."""
    model, tokenizer = load_native(small.model.dir("model"))
    decoded: list[str] = []
    original = Feed.prompt

    def count(self: Feed, sample: Sample, **options: Any) -> Any:
        decoded.append(sample.media[0])
        return original(self, sample, **options)

    monkeypatch.setattr(Feed, "prompt", count)
    samples = read_samples(small.samples.path("samples.parquet"), split="heldout", sources=["colours"])
    Questions.prepare(samples, Feed(tokenizer, model.config))
    assert (len(samples), sorted(decoded)) == (16, sorted({sample.media[0] for sample in samples}))


def test_answers_keep_their_order_in_any_batch(small: Any, prepared: Callable[[str], Questions]) -> None:
    """Answers that move by one inside a batch are all wrong, and look like a weak model."""
    model, tokenizer = load_native(small.model.dir("model"))
    prompts = prepared("colours").prompts("own")
    one, many = (answers(model, tokenizer, prompts, batch=b, max_new_tokens=3, what="test") for b in (1, 5))
    assert one == many
    assert len(one) == 16


def test_a_question_too_long_for_the_decoder_is_unanswered(
    small: Any, prepared: Callable[[str], Questions], capsys: pytest.CaptureFixture[str]
) -> None:
    """One long question among ten thousand ended the evaluation; cut short it would be another question."""
    from dataclasses import replace

    from nvila.components.data.samples import Turn

    model, tokenizer = load_native(small.model.dir("model"))
    prompts = prepared("colours").prompts("own", 3)
    long = replace(prompts[1], turns=[Turn("human", "<image>\n" + "word " * 300)])
    how: dict[str, Any] = {"batch": 2, "max_new_tokens": 2, "what": "final"}
    said = answers(model, tokenizer, [prompts[0], long, *prompts[1:]], **how)
    assert said == [said[0], "", *answers(model, tokenizer, prompts, **how)[1:]]
    assert "final: 1 of 4 questions are too long for the decoder's 256 positions" in capsys.readouterr().err


def test_sources_may_call_their_pictures_alike(small: Any, tmp_path: Path) -> None:
    """Asked together, the questions of one source were put to the pictures of another that have the same names."""
    import shutil
    from dataclasses import replace

    import torch

    model, tokenizer = load_native(small.model.dir("model"))
    samples = read_samples(small.samples.path("samples.parquet"), split="heldout", sources=["colours"])
    first = samples[0]
    different = next(sample for sample in samples if sample.answer != first.answer and sample.media != first.media)
    shutil.copyfile(different.root / different.media[0], tmp_path / first.media[0])
    other = replace(first, id="o/heldout/0", source="o", root=tmp_path, media_sha256=different.media_sha256)
    both = Questions.prepare([first, other], Feed(tokenizer, model.config)).prompts("own")
    seen = [prompt.visuals[0].tiles for prompt in both]
    assert not torch.equal(*seen)
