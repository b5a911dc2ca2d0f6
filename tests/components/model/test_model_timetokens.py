import math
from typing import Any

import numpy as np
import pytest
import torch

from nvila.components.contracts.errors import ConfigError
from nvila.components.model.batch import collate
from nvila.components.model.fresh import init_model
from nvila.components.model.text.conversation import Turn
from nvila.components.model.text.prompt import make_prompt
from nvila.components.model.text.timetokens import (
    add_time_tokens,
    soft_cross_entropy,
    time_token_ids,
    to_seconds,
    to_time_tokens,
)
from nvila.components.model.text.tokenizer import load_tokenizer, save_tokenizer, with_markers


@pytest.fixture
def timed(tokenizer: Any, tmp_path: Any) -> Any:
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path / "plain", 256)
    made = AutoTokenizer.from_pretrained(tmp_path / "plain")
    add_time_tokens(made, 5)
    save_tokenizer(with_markers(made), tmp_path / "timed", 256)
    return load_tokenizer(tmp_path / "timed")


def test_time_tokens_are_saved_and_single(timed: Any, tokenizer: Any) -> None:
    """Prevents time tokens that are cut into pieces, forgotten on saving, or put behind the media markers."""
    ids = time_token_ids(timed)
    assert len(ids) == 5 and ids == tuple(range(ids[0], ids[0] + 5))
    assert timed("at <t3>.", add_special_tokens=False)["input_ids"].count(ids[3]) == 1
    assert max(ids) < timed.convert_tokens_to_ids("<vila/sentinel>")
    assert time_token_ids(tokenizer) == ()
    with pytest.raises(ConfigError, match="before the media"):
        add_time_tokens(timed, 9)


@pytest.mark.parametrize("std", [0.5, 1.0, 3.0])
def test_soft_cross_entropy(std: float) -> None:
    """Prevents another target than the published one, against a literal loop; other tokens keep the usual loss."""
    torch.manual_seed(0)
    ids, targets = [4, 5, 6, 7], [1, 5, 7, 9, 4]
    logits = torch.randn(len(targets), 12, dtype=torch.float64)
    found = soft_cross_entropy(logits, torch.tensor(targets), ids, std)
    for row, target in enumerate(targets):
        x = logits[row].numpy()
        logp = x - math.log(np.exp(x).sum())
        expected = -logp[target]
        if target in ids:
            weights = {j: math.exp(-((target - j) ** 2) / (2 * std**2)) for j in ids}
            expected = -sum(w / sum(weights.values()) * logp[j] for j, w in weights.items())
        assert float(found[row]) == pytest.approx(expected)
    narrow = soft_cross_entropy(logits, torch.tensor(targets), ids, 1e-3)
    assert torch.allclose(narrow, torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none"))


def test_the_model_uses_it_in_training(timed: Any, configure: Any, picture: Any) -> None:
    """Prevents a model with time tokens from being trained as if a miss by one were a miss by a hundred."""
    losses = []
    for std in (1e-3, 1.0):
        model = init_model(configure(soft_ce_std=std), timed, 0)
        prompt = make_prompt([Turn("human", "When?"), Turn("gpt", "<t2> to <t4>")], [picture()], model.config)
        batch = collate([(prompt.encode(timed), prompt.visuals)], timed.pad_token_id)
        loss = model(**batch.forward_arguments()).loss
        loss.backward()
        losses.append(float(loss.detach()))
        assert model.llm.model.norm.weight.grad is not None
    assert losses[0] != pytest.approx(losses[1], abs=1e-6)


def test_marks_of_a_video(timed: Any, configure: Any, picture: Any) -> None:
    """Prevents start, end and separator texts of the configuration from being dropped on the way to the decoder."""
    config = configure(vision_mode="resize", video_texts=("row", "\n", "yes no"))
    frames = [picture(seed=i) for i in range(4)]
    lengths = []
    for texts in (("", "\n", ""), config.video_texts):
        model = init_model(configure(vision_mode="resize", video_texts=texts), timed, 0).eval()
        prompt = make_prompt([Turn("human", "Hm?")], [frames], model.config)
        batch = collate([(prompt.encode(timed, generate=True), prompt.visuals)], timed.pad_token_id)
        lengths.append(model(batch.input_ids, batch.attention_mask, batch.visuals).logits.shape[1])
    row, sep = (len(timed(text, add_special_tokens=False)["input_ids"]) for text in ("row", "yes no"))
    assert lengths[1] - lengths[0] == 2 * row + sep


def test_seconds_and_tokens() -> None:
    """Prevents answers in tokens that no person can read, and times behind the end of the video."""
    assert to_seconds("from <t0> to <t33>, <t99>, <t250>", 30.0, 100) == "from <0.0> to <10.0>, <30.0>, <30.0>"
    assert to_seconds("<t7>", 10.0, 100) == "<0.71>"
    assert to_time_tokens("from <0.0> to <10.0> and <45>", 30.0, 100) == "from <t0> to <t33> and <t99>"


@pytest.mark.parametrize(
    ("text", "duration", "number", "expected"),
    [
        ("<t99> <t100>", 12.3456, 100, "<12.35> <12.35>"),
        ("<t1> <t2> <t250>", 2.675, 3, "<1.34> <2.67> <2.67>"),  # 2.675 is below its name
        ("<t1>", 0.25, 3, "<0.12>"),  # halves go to even
        ("<t1> <t2>", 30, 2, "<30.0> <30.0>"),
        ("<t0> <t5>", 12.3456, 1, "<12.35> <12.35>"),
        ("<t0>", 12.3456, 0, "<12.35>"),
        ("<t0> <t7>", 0.0, 5, "<0.0> <0.0>"),
        ("<t03> <t> <t-1> <T1> <t\u0663>", 10.0, 5, "<t03> <t> <t-1> <T1> <t\u0663>"),
        ("<t" + "9" * 18 + ">", 10.0, 5, "<10.0>"),
    ],
)
def test_seconds_are_rounded(text: str, duration: float, number: int, expected: str) -> None:
    """Prevents a time behind the end with all the digits of the duration, and text that is no time token from turning
    into one."""
    assert to_seconds(text, duration, number) == expected


@pytest.mark.parametrize(
    ("text", "duration", "number", "expected"),
    [
        ("<.5> <1.> <2> <2.5>", 4.0, 5, "<t0> <t1> <t2> <t2>"),  # halves go to even
        ("<1.5> <3.5>", 4.0, 5, "<t2> <t4>"),
        ("<1>", 0.0, 5, "<t0>"),
        ("<1> <9>", 4.0, 1, "<t0> <t0>"),
        ("<1>", 4.0, 0, "<1>"),
        ("<" + "9" * 400 + ">", 4.0, 5, "<t4>"),
        ("<.> <1.2.3> <-1>", 4.0, 5, "<.> <1.2.3> <-1>"),
    ],
)
def test_times_become_the_nearest_token(text: str, duration: float, number: int, expected: str) -> None:
    """Prevents times that the reference reads from staying text, and tokens that are not in the vocabulary."""
    assert to_time_tokens(text, duration, number) == expected


def test_special_time_tokens_are_refused(tokenizer: Any, tmp_path: Any) -> None:
    """Prevents training without any time token, and answers that are shown without them."""
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path / "plain", 256)
    made = AutoTokenizer.from_pretrained(tmp_path / "plain")
    made.add_tokens(["<t0>", "<t1>"], special_tokens=True)
    with pytest.raises(ConfigError, match=r"time tokens are special.*<t0>.*special"):
        time_token_ids(with_markers(made))
