"""What a recipe allows of its media, from `validate` to every place that decodes them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from telling import evaluation, scored

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.recipe.data import Validation
from nvila.components.contracts.recipe.layers import parse_recipe
from nvila.components.data import media, samples
from nvila.components.data.media import Limits, MediaError, load_image
from nvila.components.data.samples import (
    Turn,
    read_labels,
    read_limits,
    read_samples,
    write_labels,
    write_samples,
)

if TYPE_CHECKING:
    from conftest import Small

DEFAULT = Limits(max_pixels=1000, max_bytes=4000, max_seconds=0.5, max_frames=2)
"""In these tests: what the recipe allows is beyond each of them, so whoever falls back to a default fails."""
ALLOWED = {"max_pixels": 20_000, "max_media_bytes": 200_000, "max_video_seconds": 60.0, "max_video_frames": 9}
SIDE = 120
"""Of the pictures and frames, in pixels."""


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Default limits that the media of these tests break."""
    defaults = (*asdict(DEFAULT).values(),)
    monkeypatch.setattr(Limits.__init__, "__defaults__", defaults)
    monkeypatch.setattr(samples, "_DEFAULT", DEFAULT)
    for name in ("load_image", "load_video_frames", "load_video_frame", "probe"):
        monkeypatch.setattr(getattr(media, name), "__defaults__", (DEFAULT,))


def noise(seed: int) -> Image.Image:
    """A picture that compresses badly: its file is larger than the default allows."""
    import numpy as np

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), dtype=np.uint8))


def film(path: Path, seed: int) -> None:
    """Four frames, a second apart."""
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(4):
            for packet in stream.encode(av.VideoFrame.from_image(noise(4 * seed + number).convert("RGB"))):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def record(name: str, kind: str, path: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<{kind}>\nWhich colour is it?"}, {"from": "gpt", "value": "red"}]
    return {"id": name, kind: path, "conversations": turns}


def source(root: Path, kind: str, suffix: str, count: int = 3) -> dict[str, Any]:
    """A source of this kind with a label for each of its training media."""
    folder = root / f"{kind}s{suffix[1:]}"
    folder.mkdir(parents=True)
    for number in range(count + 1):
        path = folder / f"{number}{suffix}"
        if suffix == ".mp4":
            film(path, number)
        elif suffix == ".png":
            noise(number).save(path)
        else:
            path.mkdir()
            for frame in range(4):
                noise(100 + 4 * number + frame).save(path / f"{frame}.png")
    names = [f"{number}{suffix}" for number in range(count + 1)]
    frame = {} if kind == "image" else {"frame": 3}
    labels = [{kind: name, "box": None, "labels": ["colour red"], **frame} for name in names[:count] for _ in range(4)]
    for split, content in (
        ("sft", [record(name, kind, name) for name in names[:count]]),
        ("heldout", [record(name, kind, name) for name in names[count:]]),
        ("labels", labels),
    ):
        (folder / f"{split}.json").write_text(json.dumps(content))
    return {"name": folder.name, "kind": kind, "path": str(folder)}


def validated(root: Path, **limits: Any) -> Path:
    """The folder that `validate` leaves of pictures, clips and folders of frames."""
    from nvila.components.validate.step import Settings, run

    sources = [source(root, "image", ".png"), source(root, "video", ".mp4"), source(root, "video", ".d")]
    out = root / "validate"
    out.mkdir()
    validation = {"max_quarantined_share": 1.0, "min_source_share": 0.0, **limits}
    run(Settings.model_validate({"data": {"sources": sources, "validation": validation}}), {}, out)
    return out


def test_what_the_recipe_allows_is_decoded_everywhere(
    tight: None, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of 51 megapixels passed validation under a recipe that allows 60, and stopped training hours later."""
    from nvila.components.initialize.tower import read_label_records
    from nvila.components.metrics.answers import Questions
    from nvila.components.model.checkpoint.native import read_config
    from nvila.components.model.feed import Feed
    from nvila.components.model.text.tokenizer import load_tokenizer
    from nvila.components.report.gallery import cards
    from nvila.components.runner.status import Run

    out = validated(tmp_path, **ALLOWED)
    assert (out / "quarantine.jsonl").read_text() == ""
    folder = small.model.dir("model")
    feed = Feed(load_tokenizer(folder / "llm"), read_config(folder))
    known = read_samples(out / "samples.parquet")
    assert len(known) == 12
    assert {len(batch.visuals) for batch in feed.batches(known, 1)} == {1}  # training, pruning, calibration
    assert len(Questions.prepare(known, Feed(feed.tokenizer, feed.config)).shown) == 12  # evaluation
    assert len(read_label_records(read_labels(out / "labels.parquet"), 28).tiles) == 36  # the vision tower

    manifests = {
        "validate": Manifest(step="validate", key="k", kind="dataset", files=describe_files(out), folder=str(out))
    }
    manifests["evaluate"] = predictions(known, tmp_path / "evaluate")
    run = Run(tmp_path, manifests=manifests)
    shown = [card.picture.uri for some in cards(run).values() for card in some]
    assert len(shown) == 12 and None not in shown  # the report


def test_what_the_recipe_allows_reaches_vllm(
    tight: None, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The questions to the quantized model are asked by another process, which knows no table."""
    from nvila.components.evaluate_quantized import step as quantized
    from nvila.components.model.checkpoint.native import read_config
    from nvila.components.model.text.tokenizer import load_tokenizer
    from nvila.components.serve import batch, batch_process

    out = validated(tmp_path, **ALLOWED)
    asked: list[Any] = []
    monkeypatch.setattr(batch, "generate_with_vllm", lambda model, requests, **_: asked.extend(requests))
    given = {"sources": ["imagespng"], "limit": None, "stage_limit": 1, "batch": 1, "max_new_tokens": 1}
    settings = quantized.Settings.model_validate({"evaluate": given, "limit": None, "through_vllm": True})
    quantized._through_vllm(tmp_path, read_samples(out / "samples.parquet"), settings, tmp_path)
    lines = [json.loads(json.dumps(asdict(request))) for request in asked]
    assert len(lines) == 12
    assert {Limits(**line["limits"]) for line in lines} == {Limits(20_000, 200_000, 60.0, 9)}
    folder = small.model.dir("model")
    tokenizer, config = load_tokenizer(folder / "llm"), read_config(folder)
    turns = [Turn("human", "Which?")]
    prompts = [batch_process._prompt(tokenizer, line, turns, config, score=False) for line in lines]
    assert all(prompt.inputs["multi_modal_data"] for prompt in prompts)


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"max_pixels": SIDE * SIDE - 1}, set()),
        ({"max_media_bytes": 1000}, set()),
        ({"max_video_seconds": 2.0}, {"imagespng", "videosd"}),
        ({"max_video_frames": 3}, {"imagespng"}),
    ],
)
def test_what_the_recipe_forbids_is_decoded_nowhere(limits: dict[str, Any], left: set[str], tmp_path: Path) -> None:
    """A limit below the default set aside a record and left its label, or a later step read what was set aside."""
    out = validated(tmp_path, **limits)
    assert {sample.source for sample in read_samples(out / "samples.parquet")} == left
    assert {label.source for label in read_labels(out / "labels.parquet")} == left
    for sample in read_samples(out / "samples.parquet"):
        assert sample.limits == read_limits(out / "labels.parquet") != Limits()


def predictions(known: list[samples.Sample], folder: Path) -> Manifest:
    """What `evaluate` leaves for the report."""
    import pyarrow
    import pyarrow.parquet as parquet

    folder.mkdir()
    said = {"question": "q", "answer": "red", "prediction": "red", "correct": True}
    rows = [{"id": s.id, "source": s.source, "root": str(s.root), "media": list(s.media), **said} for s in known]
    for wrong in rows[::2]:
        wrong["correct"] = False
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "predictions.parquet")
    told = evaluation({row["source"]: scored(0.5) for row in rows})
    files = describe_files(folder)
    return Manifest(step="evaluate", key="k", kind="metrics", files=files, result=told, folder=str(folder))


def test_limits_share_one_object(tmp_path: Path) -> None:
    """A million samples must not carry a million copies."""
    row = {"id": "a/sft/1", "source": "a", "kind": "image", "split": "sft", "root": "/", "media": [], "line": 1}
    row |= {"media_sha256": [], "conversations": "[]", "question": "", "answer": ""}
    label = {"source": "a", "root": "/", "media": "a.png", "frame": None, "box": None, "labels": []}
    wanted = Limits(max_pixels=7, max_seconds=0.25)
    write_samples(tmp_path / "s.parquet", [row, row], wanted)
    write_labels(tmp_path / "l.parquet", [label, label], wanted)
    for one, two in (read_samples(tmp_path / "s.parquet"), read_labels(tmp_path / "l.parquet")):
        assert one.limits == wanted and one.limits is two.limits


@pytest.mark.parametrize("said", [b"{", b"[]", b"null", b'{"max_colours": 1}'])
def test_damaged_limits_are_named(said: bytes, tmp_path: Path) -> None:
    """Limits that cannot be read are not the default ones."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.table({"source": ["a"]})
    parquet.write_table(table, tmp_path / "plain.parquet")
    assert read_limits(tmp_path / "plain.parquet") == Limits()
    parquet.write_table(table.replace_schema_metadata({samples._LIMITS: said}), tmp_path / "s.parquet")
    with pytest.raises(DataError, match=r"s\.parquet: not a readable table"):
        read_limits(tmp_path / "s.parquet")


def test_pillow_refuses_nothing_that_the_recipe_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has a limit of its own (179 million pixels), which also counts when a box is cut out of a picture."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    noise(0).save(tmp_path / "a.png")
    with pytest.raises(MediaError) as raised:
        load_image(tmp_path / "a.png", Limits(max_pixels=SIDE * SIDE - 1))
    assert raised.value.problem == "too_large"
    picture = load_image(tmp_path / "a.png", Limits(max_pixels=SIDE * SIDE))
    assert picture.crop((0, 0, SIDE, SIDE)).size == (SIDE, SIDE)


@pytest.mark.parametrize(
    "name", [name for name in Validation.model_fields if name.startswith("max_") and "share" not in name]
)
@pytest.mark.parametrize("value", [0, -1])
def test_limits_are_positive(name: str, value: int) -> None:
    """A limit of 0 would set everything aside, and a negative one too, each with a puzzling reason."""
    recipe = {"name": "r", "data": {"sources": [], "validation": {name: value}}}
    with pytest.raises(ConfigError, match=rf"data\.validation\.{name}.*greater than or equal|more\)"):
        parse_recipe(recipe)
