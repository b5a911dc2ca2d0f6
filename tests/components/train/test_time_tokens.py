"""A stage that changes the model: other frames and pooling, and time tokens, which it adds and trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.recipe.changes import ModelChanges
from nvila.components.train.job import Job

CHANGES = {"video": {"frames": 8, "pool_sizes": [[4, 1, 1]]}, "time_tokens": 5}


class Never:
    """Nobody asks to stop."""

    asked = False


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of two seconds, and when each turns blue."""
    from PIL import Image

    from nvila.components.data.samples import write_samples

    root, rows = tmp_path_factory.mktemp("timed"), []
    for n in range(8):
        frames = [Image.new("RGB", (28, 28), (0, 0, 200) if i >= n // 2 else (200, 0, 0)) for i in range(4)]
        for i, frame in enumerate(frames):
            frame.putpixel((i, n), (255, 255, 255))  # GIF drops a frame like the one before
        frames[0].save(root / f"{n}.gif", save_all=True, append_images=frames[1:], duration=500)
        when = f"<{n // 2 * 0.5}>"
        turns = [
            {"from": "human", "value": "<vila/video>\nWhen is it blue? After <0.0>."},
            {"from": "gpt", "value": when},
        ]
        row = {"id": f"t/sft/{n}", "source": "t", "kind": "video", "split": "sft", "root": str(root), "line": n}
        row |= {"media": [f"{n}.gif"], "media_sha256": [""], "conversations": json.dumps(turns)}
        rows.append(row | {"question": "When is it blue?", "answer": when})
    write_samples(root / "samples.parquet", rows)
    return root / "samples.parquet"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("precision", "zero"), [("fp32", 0), ("bf16", 3)])
def test_a_stage_adds_time_tokens_and_trains_them(
    make_job: Callable[..., Job], samples: Path, precision: str, zero: int
) -> None:
    """Without rows of their own they would be ids behind the vocabulary; and what is saved must know of them."""
    import torch

    from nvila.components.data.samples import read_samples
    from nvila.components.model.checkpoint.native import load_native
    from nvila.components.model.decode import answer
    from nvila.components.model.feed import Feed
    from nvila.components.train.loop import train

    stage = {"data": {"t.sft": 2}, "model": CHANGES, "learning_rate": 1e-2}
    job = make_job("a", stage=stage, run={"precision": precision, "zero": zero}, samples=str(samples))
    train(job, Never())  # type: ignore[arg-type]
    old, _ = load_native(job.model)
    model, tokenizer = load_native(Path(job.out, "model"))
    config, before = model.config, old.tokens.vocabulary
    assert (config.sampling.frames, config.video_pool_sizes, config.time_tokens) == (8, ((4, 1, 1),), 5)
    assert old.config.video_pool_sizes == ((2, 1, 1),)
    assert model.tokens.time == tuple(range(before, before + 5))
    rows = model.llm.get_input_embeddings().weight
    assert rows.shape[0] == before + 5
    assert all(not rows[before].equal(rows[before + n]) for n in (1, 2, 3))  # from one mean each has gone its own way
    sample = read_samples(samples)[4]
    encoded, _ = Feed(tokenizer, config).item(sample)
    assert next(label for label in encoded.labels if label >= 0) == before + 2  # <1.0> of 2 s
    assert encoded.input_ids.count(before) == 1
    prompt = Feed(tokenizer, config).prompt(sample)
    said = tokenizer("at <t3>, not <t", add_special_tokens=False)["input_ids"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer, "decode_tokens", lambda *_: [said])
        patch.setattr(answer, "decode_steps", lambda *_: (torch.tensor([token]) for token in said))
        assert answer.generate(model, tokenizer, [prompt], 9) == ["at <1.5>, not <t"]
        assert "".join(answer.stream(model, tokenizer, prompt, 9)) == "at <1.5>, not <t"


@pytest.mark.usefixtures("one_rank")
def test_two_processes_that_share_the_model_grow_it_alike(make_job: Callable[..., Job], samples: Path) -> None:
    """Of a tensor whose new rows are made on one of them, the other's share would be of another size, or of noise."""
    from matrix import on_ranks, weights

    from nvila.components.train.loop import train

    stage = {"data": {"t.sft": 2}, "model": CHANGES, "learning_rate": 1e-2}
    alone = make_job("alone", stage=stage, samples=str(samples))
    train(alone, Never())  # type: ignore[arg-type]
    shared = make_job("shared", stage=stage, run={"zero": 3, "gpus": 2}, samples=str(samples))
    on_ranks([shared], 2)
    ours, wanted = weights(Path(shared.out, "model")), weights(Path(alone.out, "model"))
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensor.allclose(ours[name], atol=2e-4), name


def test_new_rows_are_the_mean_of_the_old(small: Any) -> None:
    """Rows of noise would say the new tokens before anything was learnt; and a second number means other times."""
    from nvila.components.model.checkpoint.changes import changed
    from nvila.components.model.checkpoint.native import load_native, load_opened, open_native

    folder = small.model.dir("model")
    old, _ = load_native(folder)
    model, _ = load_opened(changed(open_native(folder), ModelChanges(time_tokens=5)), "float32", "cpu")
    rows, count = model.llm.get_input_embeddings().weight, old.tokens.vocabulary
    assert rows[:count].equal(old.llm.get_input_embeddings().weight)
    assert all(row.allclose(rows[:count].mean(0), atol=1e-6) for row in rows[count:]) and len(rows) == count + 5
    assert changed(open_native(folder), ModelChanges()) == open_native(folder)


def test_another_number_of_time_tokens_is_refused(small: Any, tmp_path: Path) -> None:
    """`<t3>` of five is another time than `<t3>` of nine."""
    from nvila.components.model.checkpoint.changes import changed
    from nvila.components.model.checkpoint.native import load_opened, open_native, save_native

    model, tokenizer = load_opened(
        changed(open_native(small.model.dir("model")), ModelChanges(time_tokens=5)), "float32", "cpu"
    )
    save_native(model, tokenizer, tmp_path)
    assert changed(open_native(tmp_path), ModelChanges(time_tokens=5)).new_tokens == 0
    with pytest.raises(ConfigError, match="has 5 time tokens"):
        changed(open_native(tmp_path), ModelChanges(time_tokens=9))
