"""Losses of answers: the same in any company, whoever else is asked, with or without the picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nvila.components.data.samples import Sample, read_samples


@pytest.fixture(scope="module")
def known(small: Any) -> tuple[Any, Any, list[Sample]]:
    """A model in float32, its tokenizer, and SFT samples with pictures and clips."""
    from nvila.components.model.checkpoint.native import load_native

    model, tokenizer = load_native(small.model.dir("model"))
    return model.eval(), tokenizer, read_samples(small.samples.path("samples.parquet"), split="sft")


def resized(model: Any, seed: int) -> Any:
    from nvila.components.model.fresh import resized_decoder

    sizes = {"hidden": 16, "layers": 1, "heads": 1, "kv_heads": 1, "mlp": 32}
    return resized_decoder(model, sizes, seed=seed).eval()


def alone(model: Any, tokenizer: Any, sample: Sample, *, blank: bool = False) -> float:
    """The training loss of one sample by itself, times its number of answer tokens."""
    import torch

    from nvila.components.metrics.answers import blank as hidden
    from nvila.components.model.feed import Feed

    (batch,) = Feed(tokenizer, model.config).batches([sample], 1)
    if blank:
        batch = replace(batch, visuals=[hidden(visual) for visual in batch.visuals])
    with torch.no_grad():
        return float(model(**batch.forward_arguments()).loss) * int((batch.labels != -100).sum())


def test_a_sample_has_the_same_loss_in_any_company(known: Any) -> None:
    """Padding, other pictures, a shared tower or a bad place for the blank picture would each change a loss a little:
    DeltaLoss is a difference of two such numbers."""
    from nvila.components.prune.decide import BLANK
    from nvila.components.prune.scoring import Panel

    model, tokenizer, samples = known
    models = {"small": resized(model, 1), "large": resized(model, 2)}
    panel = Panel({name: (one, tokenizer) for name, one in models.items()})
    found: dict[str, dict[str, Any]] = {}
    for scored in panel.score(samples, blind="large"):
        assert not scored.skipped
        for name, losses in scored.losses.items():
            found.setdefault(name, {}).update(losses)
    assert len(panel._sights) == 1
    for sample in samples:
        for name, one in models.items():
            assert found[name][sample.id].nats == pytest.approx(alone(one, tokenizer, sample), abs=1e-4)
        blind = alone(models["large"], tokenizer, sample, blank=True)
        assert found[BLANK][sample.id].nats == pytest.approx(blind, abs=1e-4)
    assert any(found[BLANK][one.id].nats != found["large"][one.id].nats for one in samples)


def test_models_with_other_towers_share_nothing(known: Any) -> None:
    """Features of one tower given to the other model would score noise."""
    import torch

    from nvila.components.prune.scoring import Panel

    model, tokenizer, samples = known
    other = resized(model, 3)
    with torch.no_grad():
        next(other.vision_tower.parameters()).add_(0.5)
    panel = Panel({"small": (resized(model, 1), tokenizer), "large": (other, tokenizer)})
    assert len(panel._sights) == 2
    (scored,) = panel.score(samples[:4])
    for sample in samples[:4]:
        assert scored.losses["large"][sample.id].nats == pytest.approx(alone(other, tokenizer, sample), abs=1e-4)


def test_right_is_what_greedy_decoding_would_say(known: Any) -> None:
    """Judged by a wrong rule, references that know every answer would be called blind."""
    from nvila.components.metrics.accuracy import is_correct
    from nvila.components.metrics.answers import Questions, answers
    from nvila.components.model.feed import Feed
    from nvila.components.prune.scoring import Panel

    model, tokenizer, samples = known
    (scored,) = Panel({"large": (model, tokenizer)}).score(samples)
    prompts = Questions.prepare(samples, Feed(tokenizer, model.config)).prompts("own")
    said = answers(model, tokenizer, prompts, batch=8, max_new_tokens=8, what="test")
    right = [is_correct(text, sample.answer) for text, sample in zip(said, samples, strict=True)]
    assert [scored.losses["large"][sample.id].right for sample in samples] == right


def test_a_picture_that_is_gone_is_named(known: Any, tmp_path: Any) -> None:
    """One damaged picture ended hours of scoring."""
    from nvila.components.prune.scoring import Panel

    model, tokenizer, samples = known
    lost = replace(samples[0], id="colours/sft/lost", root=tmp_path)
    (scored,) = Panel({"large": (model, tokenizer)}).score([lost, samples[1]])
    assert [one.id for one in scored.skipped] == ["colours/sft/lost"]
    assert list(scored.losses["large"]) == [samples[1].id]


def test_pictures_of_one_name_in_two_folders_are_two(known: Any, tmp_path: Any) -> None:
    """Where two sources called a picture `0001.png`, samples of one were scored on the picture of the other."""
    from nvila.components.prune.clusters import pooled
    from nvila.components.prune.scoring import Panel

    model, tokenizer, samples = known
    one, other = [sample for sample in samples if sample.kind == "image" and len(sample.media) == 1][::3][:2]
    folder = tmp_path / "other"
    (folder / one.media[0]).parent.mkdir(parents=True)
    (folder / one.media[0]).write_bytes((other.root / other.media[0]).read_bytes())
    twin = replace(one, id="twin", root=folder, media_sha256=())
    (scored,) = Panel({"large": (model, tokenizer)}).score([one, twin])
    for sample in (one, twin):
        assert scored.losses["large"][sample.id].nats == pytest.approx(alone(model, tokenizer, sample), abs=1e-4)
    from nvila.components.model.feed import Feed

    seen = pooled(model, Feed(tokenizer, model.config), [one, twin])
    assert (seen[0] != seen[1]).any()
