"""The model that stage 1 starts from: a tower taught by labels alone, or published weights put together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from buckets import Bucket

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.recipe.model import ModelSettings
from nvila.components.data.samples import read_labels, write_labels, write_samples
from nvila.components.data.sampling import Sampling
from nvila.components.initialize import step
from nvila.components.initialize.assemble import assemble
from nvila.components.initialize.labels import tower_labels
from nvila.components.initialize.scratch import make
from nvila.components.initialize.tower import read_label_records, train_tower
from nvila.components.model.checkpoint.native import load_native

HERE = Environment()


def settings(**changes: Any) -> ModelSettings:
    base = {
        "tower": {"hidden": 24, "layers": 2, "heads": 2, "mlp": 48},
        "decoder": {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 64, "vocabulary": 300},
        "tower_epochs": 2,
        "batch": 8,
    } | changes.pop("base", {})
    return ModelSettings.model_validate(
        {"s2_scales": [28, 56], "max_tiles": 4, "max_length_tokens": 256, "base": base} | changes
    )


def label(root: Path, media: str, labels: list[str], **place: Any) -> dict[str, Any]:
    return {"source": "s", "root": str(root), "media": media, "frame": None, "box": None, "labels": labels} | place


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """A picture, red on the left and blue on the right, and a clip of the same two colours."""
    from PIL import Image

    picture = Image.new("RGB", (40, 20), (0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, 20, 20))
    picture.save(tmp_path / "p.png")
    (tmp_path / "clip").mkdir()
    for i, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        Image.new("RGB", (20, 20), colour).save(tmp_path / "clip" / f"{i}.png")
    return tmp_path


def test_a_record_denies_only_what_it_speaks_of(halves: Path) -> None:
    """Labels that a record says nothing about must not be learnt as absent: half of them are there."""
    rows = [
        label(halves, "p.png", ["colour red", "bright"], box=[0.0, 0.0, 0.5, 1.0]),
        label(halves, "p.png", ["colour blue"], box=[0.5, 0.0, 1.0, 1.0]),
        label(halves, "clip", ["row 1 column 2: 7", "dark"], frame=1),
    ] * 10
    write_labels(halves / "labels.parquet", rows)
    records = read_label_records(read_labels(halves / "labels.parquet"), 28)
    assert records.labels == ["bright", "colour blue", "colour red", "dark", "row 1 column 2: 7"]
    assert records.targets[:3].int().tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert records.known[:3].int().tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 1]]


def test_a_record_shows_its_box_or_its_frame(halves: Path) -> None:
    """Labels that meet another part of the picture, or another frame, teach noise."""
    rows = [
        label(halves, "p.png", ["colour red"], box=[0.0, 0.0, 0.5, 1.0]),
        label(halves, "p.png", ["colour blue"], box=[0.5, 0.0, 1.0, 1.0]),
        label(halves, "clip", ["colour red"], frame=0),
        label(halves, "clip", ["colour blue"], frame=1),
    ] * 10
    write_labels(halves / "labels.parquet", rows)
    records = read_label_records(read_labels(halves / "labels.parquet"), 28)
    assert records.tiles.shape == (40, 3, 28, 28)
    colours = records.tiles[:4].float().mean((2, 3)).round().tolist()
    assert colours == [[255, 0, 0], [0, 0, 255], [255, 0, 0], [0, 0, 255]]


def test_a_label_picture_that_is_gone_is_left_out_and_named(halves: Path) -> None:
    """One picture of many that was damaged after validation ended the step; without the share, all of them may be."""
    from PIL import Image

    for n in range(20):
        Image.new("RGB", (28, 28), (n, 0, 0)).save(halves / f"{n}.png")
    rows = [label(halves, f"{n}.png", [f"colour {n % 2}"]) for n in range(20) for _ in range(2)]
    write_labels(halves / "labels.parquet", rows)
    (halves / "7.png").unlink()
    records = read_label_records(read_labels(halves / "labels.parquet"), 28, 0.05)
    assert len(records.tiles) == len(records.targets) == len(records.known) == len(records.weights) == 38
    assert sorted(set(records.tiles[:, 0, 0, 0].tolist())) == [n for n in range(20) if n != 7]
    assert records.skipped.records == 1 and "7.png" in records.skipped.first[0]
    with pytest.raises(DataError, match=r"1 of 20 records .*7\.png"):
        read_label_records(read_labels(halves / "labels.parquet"), 28, 0.0)


def test_the_tower_learns_from_labels(tmp_path: Path) -> None:
    """A tower that learns nothing makes every later stage a language model without eyes. Chance is 0.25."""
    from PIL import Image

    from nvila.components.initialize.scratch import decoder_config, tower_config
    from nvila.components.model.config.config import model_config
    from nvila.components.model.fresh import init_model
    from nvila.components.model.text.tokenizer import train_tokenizer

    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in range(480):
        pixels = torch.randint(60, 120, (28, 28, 3), generator=generator, dtype=torch.uint8)
        row, column = divmod(n % 4, 2)
        pixels[14 * row : 14 * row + 14, 14 * column : 14 * column + 14] += 80
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{n}.png")
        rows.append(label(tmp_path, f"{n}.png", [f"place {n % 4}"]))
    write_labels(tmp_path / "labels.parquet", rows)
    given = settings()
    config = model_config(given, tower_config(given.base.tower, 28), decoder_config(given.base.decoder, given))
    model = init_model(config, train_tokenizer(["a"], 300), seed=0)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("vision_tower.")}
    records = read_label_records(read_labels(tmp_path / "labels.parquet"), 28)
    found = train_tower(model, records, epochs=12, learning_rate=3e-3, batch=32, seed=0)
    assert found["accuracy"] >= 0.75
    assert found["steps"] == -(-12 * 456 // 32)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_the_sampling_of_clips_is_the_recipe_s_everywhere() -> None:
    """A rate that training keeps to and a checkpoint forgets shows the model other frames when it is asked."""
    from nvila.components.initialize.scratch import decoder_config, tower_config
    from nvila.components.model.config.config import ModelConfig, model_config

    given = settings(video={"frames": 8, "fps": 2})
    config = model_config(given, tower_config(given.base.tower, 28), decoder_config(given.base.decoder, given))
    assert ModelConfig.from_json(config.to_json()).sampling == config.sampling == Sampling(8, 2.0)
    assert Sampling.from_options(config.sampling.to_options()) == config.sampling


def tables(root: Path, labels: list[dict[str, Any]], talks: list[tuple[str, str, str]]) -> Manifest:
    """Tables of labels, and of samples of one picture each: split, question and answer."""
    write_labels(root / "labels.parquet", labels)
    rows = [
        {
            "id": f"s/{split}/{i}",
            "source": "s",
            "kind": "image",
            "split": split,
            "root": str(root),
            "media": [f"{i}.png"],
            "media_sha256": [None],
            "conversations": json.dumps(
                [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            ),
            "question": question,
            "answer": answer,
            "line": i,
        }
        for i, (split, question, answer) in enumerate(talks)
    ]
    write_samples(root / "samples.parquet", rows)
    return Manifest(step="validate", key="k", kind="dataset", files=describe_files(root), folder=str(root))


@pytest.mark.parametrize("count", [0, 3])
def test_a_tower_without_labels_is_refused(tmp_path: Path, count: int) -> None:
    """A blank tower looks trained until the last gate."""
    samples = tables(tmp_path, [label(tmp_path, "0.png", ["colour red"])] * count, [("heldout", "Which?", "red")] * 30)
    with pytest.raises(DataError, match=r"labels\.json.*got " + str(count)):
        tower_labels(samples)


def test_without_labels_the_texts_stand_in(tmp_path: Path) -> None:
    """Sources of pictures and answers alone, as most people have them, were refused after the data had been checked."""
    colours = ["red", "Blue.", "light green"]
    answers = [("sft", "Which colour is it?", colours[i % 3]) for i in range(30)]
    (tmp_path / "answers").mkdir()
    found, made_of = tower_labels(tables(tmp_path / "answers", [], [*answers, ("sft", "Where is it?", "here")]))
    assert made_of == "answers" and len(found) == 30  # a question with one answer tells nothing
    colour = "which colour is it?"
    assert [one.labels for one in found[:3]] == [(f"{colour} red",), (f"{colour} blue",), (f"{colour} light_green",)]

    captions = [("captions", "Describe it.", f"The photograph of one {('cat', 'dog')[i % 2]} again") for i in range(30)]
    (tmp_path / "captions").mkdir()
    found, made_of = tower_labels(tables(tmp_path / "captions", [], [*captions, *answers]))
    assert made_of == "words of captions" and len(found) == 30
    assert {one.labels for one in found} == {("cat",), ("dog",)}  # what every caption says tells nothing


def test_the_tower_never_sees_questions_or_answers(small: Any, tmp_path: Path) -> None:
    """A tower taught by the SFT answers has seen what the stages are to be measured on.

    The answers of pictures are exchanged, which leaves the texts as a whole, and so the tokenizer, as they were.
    """
    import pyarrow.parquet as parquet

    rows = parquet.read_table(small.samples.path("samples.parquet")).to_pylist()
    swapped = [row for row in rows if row["split"] == "sft" and row["source"] == "colours"]
    talks = [row["conversations"] for row in swapped]
    for row, talk in zip(swapped, talks[2:] + talks[:2], strict=True):
        row["conversations"] = talk
    write_samples(tmp_path / "samples.parquet", rows)
    (tmp_path / "labels.parquet").write_bytes(small.samples.path("labels.parquet").read_bytes())
    other = small.samples.model_copy(update={"folder": str(tmp_path), "files": describe_files(tmp_path)})
    values = [
        make(settings(), 0, samples, tmp_path / name, 0.01) for name, samples in (("a", small.samples), ("b", other))
    ]
    assert values[0] == values[1]
    towers = [load_native(tmp_path / name)[0].vision_tower.state_dict() for name in "ab"]
    assert all(torch.equal(towers[0][name], towers[1][name]) for name in towers[0])


def test_the_step_writes_a_model_that_loads_and_is_the_same_again(small: Any, tmp_path: Path) -> None:
    """A base that differs from run to run makes every stage after it a new piece of work."""
    given = step.Settings(model=settings(), seed=3, max_skipped_share=0.01)
    outcomes = [step.run(given, {"samples": small.samples}, tmp_path / name, HERE) for name in "ab"]
    assert outcomes[0].result == outcomes[1].result
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)
    model, tokenizer = load_native(tmp_path / "a" / "model")
    told = outcomes[0].result
    assert told.parameters["llm"] == sum(p.numel() for p in model.llm.parameters())
    assert (told.label_pictures, told.labels, len(tokenizer)) == (24, 6, told.vocabulary)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, small: Any) -> Path:
    """Weights as a hub carries them: a SigLIP tower, a whole SigLIP with its text tower, a Qwen2 with tokenizer."""
    import shutil

    from transformers import (
        Qwen2Config,
        Qwen2ForCausalLM,
        SiglipConfig,
        SiglipModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    root = tmp_path_factory.mktemp("published")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    torch.manual_seed(1)
    SiglipVisionModel(SiglipVisionConfig(**vision)).save_pretrained(root / "tower")
    whole = SiglipConfig(text_config=sizes | {"vocab_size": 50}, vision_config=vision)
    SiglipModel(whole).save_pretrained(root / "siglip")
    shutil.copytree(small.model.dir("model") / "llm", root / "qwen2")
    tokens = json.loads((root / "qwen2" / "config.json").read_text())["vocab_size"]
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    llm = Qwen2Config(**{**sizes, **heads, "hidden_size": 32, "vocab_size": tokens, "tie_word_embeddings": False})
    Qwen2ForCausalLM(llm).save_pretrained(root / "qwen2")
    (root / "qwen2" / "modeling_qwen2.py").write_text("raise SystemExit('code of a checkpoint ran')")
    return root


@pytest.mark.parametrize("tower", ["tower", "siglip"])
def test_published_weights_arrive_unchanged(published: Path, tmp_path: Path, tower: str) -> None:
    """A tensor lost or renamed on the way is a random tensor in a model of billions."""
    from safetensors.torch import load_file

    base = {"vision_tower": str(published / tower), "llm": str(published / "qwen2")}
    given = step.Settings(model=settings(base=base), seed=0, max_skipped_share=0.01)
    outcome = step.run(given, {}, tmp_path, HERE)
    model, tokenizer = load_native(tmp_path / "model")
    ours = {name.removeprefix("vision_model."): p for name, p in model.vision_tower.state_dict().items()}
    theirs = load_file(published / tower / "model.safetensors")
    theirs = {name.removeprefix("vision_model."): p for name, p in theirs.items()}
    assert ours and all(torch.equal(p, theirs[name]) for name, p in ours.items())
    decoder = load_file(published / "qwen2" / "model.safetensors")
    assert all(torch.equal(p, decoder[name]) for name, p in model.llm.state_dict().items())
    assert outcome.result.parameters["llm"] == sum(p.numel() for p in decoder.values())
    assert not list((tmp_path / "model").rglob("*.py"))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") is not None


def test_published_weights_with_an_adapter_are_refused(published: Path, tmp_path: Path) -> None:
    """A fine-tune whose adapter was never merged would be trained on as the model below it."""
    import shutil

    shutil.copytree(published / "qwen2", tmp_path / "tuned")
    (tmp_path / "tuned" / "adapter_config.json").write_text("{}")
    base = {"vision_tower": str(published / "tower"), "llm": str(tmp_path / "tuned")}
    with pytest.raises(DataError, match=r"adapter.*left out"):
        step.run(step.Settings(model=settings(base=base), seed=0, max_skipped_share=0.01), {}, tmp_path / "out", HERE)


@pytest.mark.parametrize("fault", ["integers", "missing", "broken"])
def test_damaged_published_weights_are_refused(published: Path, tmp_path: Path, fault: str) -> None:
    """Weights that cannot be those of the model end a run in stage 1, long after the step that took them."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(published / "qwen2", tmp_path / "qwen2")
    file = tmp_path / "qwen2" / "model.safetensors"
    tensors = load_file(file)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors | ({} if fault == "missing" else {"model.norm.weight": norm.to(torch.int8)}), file)
    if fault == "broken":
        (tmp_path / "qwen2" / "config.json").write_text("{")
    base = {"vision_tower": str(published / "tower"), "llm": str(tmp_path / "qwen2")}
    with pytest.raises(
        DataError, match=r"config\.json: not readable" if fault == "broken" else r"llm\.model\.norm\.weight"
    ):
        assemble(settings(base=base), 0, tmp_path / "model")


@pytest.mark.parametrize(
    ("tower", "llm", "changes", "message"),
    [
        ("qwen2", "qwen2", {}, r"model\.base\.vision_tower: not a siglip_vision_model model \(got 'qwen2'\)"),
        ("tower", "tower", {}, r"model\.base\.llm: not a qwen2 model \(got 'siglip_vision_model'\)"),
        ("tower", ".", {}, r"model\.base\.llm: no config\.json"),
        ("tower", "qwen2", {"s2_scales": [56, 112]}, "image_size 28 is not the first scale"),
        ("tower", "qwen2", {"select_layer": -9}, "the tower has 2 layers"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    published: Path, tmp_path: Path, tower: str, llm: str, changes: dict[str, Any], message: str
) -> None:
    """A wrong model is copied for an hour, and fails in stage 1."""
    base = {"vision_tower": str(published / tower), "llm": str(published / llm)}
    with pytest.raises(ConfigError, match=message):
        assemble(settings(base=base, **changes), 0, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_local_weights_belong_to_the_key(published: Path, tmp_path: Path) -> None:
    """Other weights at the same path are another model; a note beside them is not."""
    import shutil

    for name in ("tower", "qwen2"):
        shutil.copytree(published / name, tmp_path / name)
    base = {"vision_tower": str(tmp_path / "tower"), "llm": str(tmp_path / "qwen2")}
    given = step.Settings(model=settings(base=base), seed=0, max_skipped_share=0.01).model_dump(mode="json")
    before = step.external(given, HERE)
    (tmp_path / "tower" / "README.md").write_text("a note")
    assert step.external(given, HERE) == before
    (tmp_path / "tower" / "model.safetensors").write_bytes(b"other")
    assert step.external(given, HERE) != before
    scratch = step.Settings(model=settings(), seed=0, max_skipped_share=0.01).model_dump(mode="json")
    assert step.external(scratch, HERE) == {"vision_tower": {}, "llm": {}}


def test_a_missing_folder_of_weights_is_the_users_error(tmp_path: Path) -> None:
    """A path with a typing error must not end in a traceback after validation."""
    base = {"vision_tower": str(tmp_path / "nowhere"), "llm": str(tmp_path / "nowhere")}
    given = step.Settings(model=settings(base=base), seed=0, max_skipped_share=0.01)
    with pytest.raises(DataError, match="nowhere: no such folder of weights"):
        step.external(given.model_dump(mode="json"), HERE)
    with pytest.raises(DataError, match="nowhere: no such folder of weights"):
        step.run(given, dict[str, Manifest](), tmp_path, HERE)


def test_replaced_weights_in_a_bucket_are_other_weights(published: Path, tmp_path: Path, s3: Bucket) -> None:
    """The name of a bucket says nothing of its content: training would be skipped with the old weights."""
    for name in ("tower", "qwen2"):
        for file in (published / name).iterdir():
            s3.put(f"{name}/{file.name}", file.read_bytes())
    given = step.Settings(
        model=settings(base={"vision_tower": "s3://b/tower", "llm": "s3://b/qwen2"}), seed=0, max_skipped_share=0.01
    )
    before = step.external(given.model_dump(mode="json"), HERE)
    made = step.run(given, dict[str, Manifest](), tmp_path, HERE)
    assert made.read == before and made.result.weights == before
    changed = bytearray(s3.objects["tower/model.safetensors"].body)
    changed[-1] ^= 1
    s3.put("tower/model.safetensors", bytes(changed))
    after = step.external(given.model_dump(mode="json"), HERE)
    assert after["llm"] == before["llm"] and after["vision_tower"] != before["vision_tower"]
    assert step.run(given, dict[str, Manifest](), tmp_path / "again", HERE).read == after
