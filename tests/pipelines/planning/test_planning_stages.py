"""`nvila plan --stages`: what follows from the rows of the stage table."""

from __future__ import annotations

import pytest

from nvila.components.contracts.errors import ConfigError
from nvila.pipelines.planning.stages import as_json, table


def test_the_table_of_the_reference() -> None:
    """Stage 5 has frames, pooling and tokens of its own; counted on stage 1's model its numbers would be others."""
    sizes = {"images.captions": 10_000, "images.sft": 100_000, "videos.sft": 30_000}
    found = {row.step: row for row in table("nvila-8b-reference", ["train.stages.train-5.pruned=false"], sizes)}
    four, five = found["train-4"], found["train-5"]
    assert (four.batch, four.micro_batch, four.passes, four.gpus) == (1024, 4, 32, 8)
    assert (four.samples, four.steps, four.clip_norm) == (50_000, 48, 5.0)
    assert four.trainable == dict.fromkeys(("vision_tower", "mm_projector", "llm"), 1.5e-5)
    assert (five.frames, five.pool_sizes, five.time_tokens, five.max_length_tokens) == (256, [(8, 1, 1)], 100, 16384)
    assert four.trained_parameters and five.trained_parameters == four.trained_parameters + 2 * 100 * 3584
    assert five.tokens == 30_000 * (32 * 257 + 128) + 10_000 * (3072 + 1 + 128)  # both of every clip and picture
    assert found["train-1"].samples == 200 and found["train-1"].steps == 0
    assert as_json(found.values())["stages"][4]["frames"] == 256


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stages.train-5.model.video.frames=250", "not a multiple of the temporal pool 8"),
        ("train.stages.train-4.model.time_tokens=100", "draws no clips"),
        ("train.stages.train-5.trainable=[mm_projector]", "does not train llm"),
        ("train.stages.train-4={model: {time_tokens: 100}, data: {videos.sft: 1}}", "has added time tokens already"),
    ],
)
def test_changes_that_cannot_take_effect_are_refused(override: str, words: str) -> None:
    """They would be found hours later, when the stage is reached, or never."""
    with pytest.raises(ConfigError, match=words):
        table("nvila-8b-reference", [override], {})
