from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from nvila.components.contracts.errors import DataError
from nvila.components.data.sampling import Sampling
from nvila.components.model.batch import Batch, collate
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.decode.answer import generate
from nvila.components.model.fresh import init_model, resized_decoder
from nvila.components.model.nvila import NVILA, build_model
from nvila.components.model.text.conversation import Turn
from nvila.components.model.text.prompt import Prompt, make_prompt
from nvila.components.model.text.tokenizer import TokenIds
from nvila.components.model.vision.tower import tower_features
from nvila.components.model.vision.visual import token_count
from nvila.components.prune.scoring import answer_losses

Picture = Callable[..., Image.Image]


def prompts_of(
    config: ModelConfig, picture: Picture, answers: Sequence[str] = ("three", "yes\nno", "4")
) -> list[Prompt]:
    media: list[Any] = [
        [picture(56, 56, 1)],
        [[picture(40, 40, i) for i in range(4)]],
        [picture(90, 40, 3), picture(30, 30, 4)],
    ]
    questions = ["Which digit is in row 2, column 1?", "Is it red?", "Which?"]
    return [
        make_prompt([Turn("human", question), Turn("gpt", answer)], each, config, pixels=True)
        for question, answer, each in zip(questions, answers, media, strict=True)
    ]


def batch_of(prompts: Sequence[Prompt], tokenizer: Any, side: Any = "right") -> Batch:
    return collate([(p.encode(tokenizer), p.visuals) for p in prompts], tokenizer.pad_token_id, side)


def test_feature_is_transformers_hidden_state(model: NVILA) -> None:
    """Prevents a feature off by one block or after the final layer norm."""
    tiles = torch.randn(3, 3, 28, 28)
    states = model.vision_tower(tiles, output_hidden_states=True).hidden_states
    for layer in (-2, 0, 1, -1):
        # The last of transformers' list is not always free of the final norm: compare it with the block's own output.
        expected = model.vision_tower.encoder(states[0]).last_hidden_state if layer == -1 else states[layer]
        assert torch.allclose(tower_features(model.vision_tower, tiles, layer), expected, atol=1e-6)


def test_last_block_is_not_run(model: NVILA, picture: Picture, tokenizer: Any) -> None:
    """Prevents time spent on a block whose output nobody reads; its weights must still be there."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the last block ran")

    model.vision_tower.encoder.layers[-1].register_forward_hook(refuse)
    batch = batch_of(prompts_of(model.config, picture), tokenizer)
    loss = model.train()(**batch.forward_arguments()).loss
    loss.backward()
    assert model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    assert model.vision_tower.encoder.layers[-1].mlp.fc1.weight.grad is None


@pytest.mark.parametrize("mode", ["resize", "dynamic", "s2", "dynamic_s2"])
def test_loss_is_the_mean_over_supervised_tokens(tokenizer: Any, picture: Picture, configure: Any, mode: str) -> None:
    """Prevents a loss over prompts or padding, unshifted labels, or a mean per sample."""
    model = init_model(configure(vision_mode=mode), tokenizer, 0)
    batch = batch_of(prompts_of(model.config, picture), tokenizer)
    out = model(**batch.forward_arguments(), full_logits=True)
    assert out.logits is not None and out.labels is not None
    logp = out.logits.log_softmax(-1)
    total, count = 0.0, 0
    for b in range(len(out.labels)):
        for t in range(1, out.labels.shape[1]):
            if out.labels[b, t] != -100:
                total -= float(logp[b, t - 1, out.labels[b, t]])
                count += 1
    assert count == sum(int((row != -100).sum()) for row in batch.labels)
    assert float(out.loss) == pytest.approx(total / count, abs=1e-5)
    assert model(**batch.forward_arguments()).logits is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_single(model: NVILA, tokenizer: Any, picture: Picture, side: str) -> None:
    """Prevents neighbours or padding, on either side, from changing a sample's logits."""
    prompts = prompts_of(model.config, picture)
    batch = batch_of(prompts, tokenizer, side)
    together = model(**{**batch.forward_arguments(), "labels": None}).logits
    for row, prompt in enumerate(prompts):
        alone = batch_of([prompt], tokenizer).forward_arguments()
        single = model(**{**alone, "labels": None}).logits[0]
        assert torch.allclose(together[row, : len(single)], single, atol=1e-5)


def test_scores_equal_the_loss(model: NVILA, tokenizer: Any, picture: Picture) -> None:
    """Prevents pruning scores that mix samples or count prompt tokens."""
    prompts = prompts_of(model.config, picture)
    found = answer_losses(model, batch_of(prompts, tokenizer, "left"))
    for scored, prompt in zip(found, prompts, strict=True):
        alone = batch_of([prompt], tokenizer)
        assert scored.tokens == (alone.labels != -100).sum()
        loss = model(**alone.forward_arguments()).loss
        assert scored.nats == pytest.approx(float(loss.detach()) * scored.tokens, abs=1e-4)


def fit(model: NVILA, batch: Batch, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch.forward_arguments()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_learns_and_generation_repeats_it(model: NVILA, tokenizer: Any, picture: Picture) -> None:
    """Prevents a broken gradient path, a generation that disagrees with training, and batches unlike singles."""
    prompts = prompts_of(model.config, picture)
    losses = fit(model, batch_of(prompts, tokenizer), 60)
    assert losses[-1] < 0.1 < losses[0]
    questions = [Prompt(p.turns[:1], p.visuals, p.markers) for p in prompts]
    together = generate(model, tokenizer, questions, 12)
    assert together == ["three", "yes\nno", "4"]
    assert model.training
    assert [generate(model, tokenizer, [q], 12)[0] for q in questions] == together
    short = generate(model, tokenizer, questions, 1)
    assert all(whole.startswith(start) for whole, start in zip(together, short, strict=True))
    assert generate(model.to(torch.bfloat16), tokenizer, questions, 12) == together


def test_generation_stops_early(model: NVILA, tokenizer: Any, picture: Picture) -> None:
    """Prevents decoding to the limit after every row has ended."""
    prompts = prompts_of(model.config, picture, answers=("3", "4", "5"))
    fit(model, batch_of(prompts, tokenizer), 80)
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    model.llm.model.norm.register_forward_hook(count)
    questions = [Prompt(p.turns[:1], p.visuals, p.markers) for p in prompts]
    assert generate(model, tokenizer, questions, 50) == ["3", "4", "5"]
    assert steps == 2
    assert generate(model, tokenizer, [], 5) == []


def test_untrained_generation_equals_full_forwards(model: NVILA, tokenizer: Any, picture: Picture) -> None:
    """Prevents a cache, mask or position error that a fitted answer would hide."""
    prompts = prompts_of(model.config, picture)
    questions = [Prompt(p.turns[:1], p.visuals, p.markers) for p in prompts]
    said = generate(model, tokenizer, questions, 6)
    for question, answer in zip(questions, said, strict=True):
        encoded = question.encode(tokenizer, generate=True)
        ids = list(encoded.input_ids)
        for _ in range(6):
            row = torch.tensor([ids])
            token = int(model(row, torch.ones_like(row), question.visuals).logits[0, -1].argmax())
            if token == model.tokens.end:
                break
            ids.append(token)
        assert tokenizer.decode(ids[len(encoded.input_ids) :], skip_special_tokens=True).strip() == answer


def test_sampling_follows_the_seed(model: NVILA, tokenizer: Any) -> None:
    """Prevents sampling that cannot be repeated or that ignores its seed."""
    prompts = [Prompt([Turn("human", "Which?")])] * 2
    said = [generate(model, tokenizer, prompts, 12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


def test_text_only_batch_still_runs_the_tower_in_training(model: NVILA, tokenizer: Any) -> None:
    """Prevents a rank without media from leaving the others waiting in a collective; the loss must not change."""
    batch = batch_of([Prompt([Turn("human", "Which?"), Turn("gpt", "yes")])], tokenizer)
    expected = model.eval()(**batch.forward_arguments()).loss
    loss = model.train()(**batch.forward_arguments()).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    grad = model.mm_projector.layers[2].weight.grad
    assert grad is not None and not grad.any()


def test_rows_are_cut_in_training_only(tokenizer: Any, picture: Picture, configure: Any) -> None:
    """Prevents rows beyond the maximal length in training, and a batch without any answer from giving NaN."""
    model = init_model(configure(max_length_tokens=8), tokenizer, 0)
    batch = batch_of(prompts_of(model.config, picture), tokenizer)
    with pytest.raises(DataError, match="no supervised token"):
        model(**batch.forward_arguments())
    assert model(**{**batch.forward_arguments(), "labels": None}).logits.shape[1] > 8


def test_media_and_markers_must_match(model: NVILA, tokenizer: Any, picture: Picture) -> None:
    """Prevents a picture from sliding to the next sample."""
    batch = batch_of(prompts_of(model.config, picture), tokenizer)
    with pytest.raises(DataError, match="media tokens"):
        model(**{**batch.forward_arguments(), "visuals": batch.visuals[:-1]})


def test_casting_keeps_rotary_frequencies_exact(model: NVILA) -> None:
    """Prevents bfloat16 engines from blurring long positions."""
    before = model.llm.model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    assert model.llm.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.llm.model.rotary_emb.inv_freq, before)


def test_long_sequences_stretch_the_positions(tokenizer: Any, configure: Any) -> None:
    """Prevents positions beyond what the decoder was trained for when the recipe asks for longer sequences."""
    plain = init_model(configure(), tokenizer, 0).llm.model.rotary_emb.inv_freq
    long = init_model(configure(max_length_tokens=1500), tokenizer, 0).llm.model.rotary_emb.inv_freq
    assert torch.allclose(long, plain / 3)
    other = init_model(configure(llm={"rope_theta": 1e6}), tokenizer, 0).llm.model.rotary_emb.inv_freq
    assert other[-1] < plain[-1] / 2


def test_seed_decides_fresh_weights(tokenizer: Any, configure: Any) -> None:
    """Prevents runs that cannot be repeated, and a constructor that disturbs the caller's random state."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (init_model(configure(), tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    name = "mm_projector.layers.2.weight"
    assert all(torch.equal(t, same.state_dict()[key]) for key, t in one.state_dict().items())
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


def test_resized_decoder_keeps_the_tower(model: NVILA, tokenizer: Any, picture: Picture) -> None:
    """Prevents reference models that see through another tower than the one that was taught."""
    sizes = {"hidden": 48, "layers": 1, "heads": 4, "kv_heads": 4, "mlp": 40}
    resized = resized_decoder(model, sizes, seed=3)
    tower = resized.vision_tower.state_dict()
    assert all(torch.equal(t, tower[name]) for name, t in model.vision_tower.state_dict().items())
    assert resized.config.llm_hidden_size == 48 and len(resized.llm.model.layers) == 1
    assert torch.isfinite(resized(**batch_of(prompts_of(model.config, picture), tokenizer).forward_arguments()).loss)


def test_gradient_checkpointing_changes_nothing(model: NVILA, tokenizer: Any, picture: Picture) -> None:
    """Prevents recomputation from losing gradients of the tower or changing the loss."""
    batch = batch_of(prompts_of(model.config, picture), tokenizer)
    model.train()
    found = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch.forward_arguments()).loss.backward()
        found.append(model.vision_tower.encoder.layers[0].mlp.fc1.weight.grad.clone())
    assert torch.allclose(*found, atol=1e-6) and bool(found[0].any())


@pytest.mark.parametrize(
    ("mode", "projector", "parameters"),
    [("dynamic_s2", "mlp_downsample", 8.09e9), ("dynamic", "mlp_downsample_3x3_fix", 8.1e9)],
)
def test_real_sizes_build(mode: str, projector: str, parameters: float) -> None:
    """Prevents anything special-cased to tiny sizes: NVILA-8B and Lite-8B are built (without memory) and counted."""
    tokens = TokenIds(151648, 151649, 151650, 198, 151645, 151647)
    vision = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304}
    llm = {"vocab_size": 151648, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28}
    llm |= {"num_key_value_heads": 4, "intermediate_size": 18944, "max_position_embeddings": 32768, "rope_theta": 1e6}
    config = ModelConfig(
        vision={**vision, "image_size": 448, "patch_size": 14},
        llm={**llm, "tie_word_embeddings": False},
        projector=projector,
        vision_mode=mode,
        s2_scales=(448, 896, 1344) if mode == "dynamic_s2" else (448,),
        s2_output_scale=-1,
        max_tiles=12,
        select_layer=-2,
        max_length_tokens=8192,
        sampling=Sampling(8),
        video_pool_sizes=((1, 1, 1),),
    )
    with torch.device("meta"):
        model = build_model(config, tokens)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.01)
    assert model.vision_tower.embeddings.position_embedding.weight.shape == (1024, 1152)
    block = (3, 4) if mode == "dynamic_s2" else None
    tiles = 17 if mode == "dynamic_s2" else 1
    assert token_count("image", block, tiles, config) == (12 * 256 + 1 if mode == "dynamic_s2" else 122)
