"""What tests of several components share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from buckets import Bucket, served

from nvila.components.contracts.manifest import Kind, Manifest, describe_files
from nvila.components.data.remote import insist
from nvila.components.data.sampling import Sampling


@pytest.fixture
def tracked_run(tmp_path: Path, empty_mlflow: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a pipeline run (`NVILA_RUN`) whose runs folder holds a real, empty MLflow store."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    run = tmp_path / "runs" / "r1"
    run.mkdir(parents=True)
    shutil.copyfile(empty_mlflow, run.parent / "mlflow.db")
    monkeypatch.setenv("NVILA_RUN", str(run))
    return run


@dataclass(frozen=True)
class Small:
    """A data set and a model so small that a step over them takes a second or two."""

    root: Path
    samples: Manifest
    """As of `validate`: image source `colours`, video source `clips` (folders of frames), label table."""
    model: Manifest
    """As of a train step: random weights in the native layout."""


COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 200), "grey": (120, 120, 120)}
PICTURES = {"sft": 12, "captions": 12, "heldout": 8}
CLIPS = {"sft": 8, "heldout": 4}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Four colours to be named, two questions a picture; written as files, tables and a checkpoint."""
    from nvila.components.data.samples import LABELS_FILE, SAMPLES_FILE, write_labels, write_samples

    root = tmp_path_factory.mktemp("small")
    rows = [row for split, count in PICTURES.items() for n in range(count) for row in _picture_rows(root, split, n)]
    rows += [_clip_row(root, split, n) for split, count in CLIPS.items() for n in range(count)]
    labels = [
        {
            "source": "colours",
            "root": str(root),
            "media": f"sft-{n}.png",
            "frame": None,
            "box": [left, 0.0, left + 0.5, 1.0],
            "labels": [f"colour {list(COLOURS)[n % 4]}", f"half {'left' if left == 0.0 else 'right'}"],
        }
        for n in range(PICTURES["sft"])
        for left in (0.0, 0.5)
    ]
    tables = root / "tables"
    tables.mkdir()
    write_samples(tables / SAMPLES_FILE, rows)
    write_labels(tables / LABELS_FILE, labels)
    _save_model(root / "made" / "model", [turn["value"] for row in rows for turn in json.loads(row["conversations"])])
    samples = manifest_of("validate", "dataset", tables)
    return Small(root, samples, manifest_of("train-3", "model", root / "made"))


def manifest_of(step: str, kind: Kind, folder: Path) -> Manifest:
    """The manifest of a finished step whose files lie in `folder`."""
    key = sha256(str(folder).encode()).hexdigest()
    return Manifest(step=step, key=key, kind=kind, files=describe_files(folder), folder=str(folder))


def _picture_rows(root: Path, split: str, n: int) -> list[dict[str, Any]]:
    from PIL import Image

    colour = list(COLOURS)[n % 4]
    picture = Image.new("RGB", (56, 56), COLOURS[colour])
    picture.putpixel((n, n), (255, 255, 255))
    picture.save(root / f"{split}-{n}.png")
    if split == "captions":
        return [_row(root, f"colours/captions/{n}", "image", f"{split}-{n}.png", "Describe it.", f"It is {colour}.")]
    media = f"{split}-{n}.png"
    return [
        _row(root, f"colours/{split}/{n}-a", "image", media, "Which colour is it?", colour),
        _row(root, f"colours/{split}/{n}-b", "image", media, "Is it red?", "yes" if colour == "red" else "no"),
    ]


def _clip_row(root: Path, split: str, n: int) -> dict[str, Any]:
    from PIL import Image

    folder = root / f"clip-{split}-{n}"
    folder.mkdir()
    order = [list(COLOURS)[(n + i) % 4] for i in range(4)]
    for i, colour in enumerate(order):
        Image.new("RGB", (28, 28), COLOURS[colour]).save(folder / f"{i}.png")
    return _row(root, f"clips/{split}/{n}", "video", folder.name, "Which colour comes first?", order[0])


def _row(root: Path, name: str, kind: str, media: str, question: str, answer: str) -> dict[str, Any]:
    source, split, _ = name.split("/")
    marker = "<image>" if kind == "image" else "<vila/video>"
    turns = [{"from": "human", "value": f"{marker}\n{question}"}, {"from": "gpt", "value": answer}]
    return {
        "id": name,
        "source": source,
        "kind": kind,
        "split": split,
        "root": str(root),
        "media": [media],
        "media_sha256": [""],
        "conversations": json.dumps(turns),
        "question": question,
        "answer": answer,
        "line": 0,
    }


def _save_model(folder: Path, texts: list[str]) -> None:
    from nvila.components.model.checkpoint.native import save_native
    from nvila.components.model.config.config import ModelConfig
    from nvila.components.model.fresh import init_model
    from nvila.components.model.text.tokenizer import train_tokenizer

    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    llm = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    llm |= {"vocab_size": 300, "intermediate_size": 64, "max_position_embeddings": 256, "tie_word_embeddings": True}
    config = ModelConfig(
        vision={**vision, "image_size": 28, "patch_size": 14},
        llm={**llm, "rope_theta": 10000.0},
        projector="mlp_downsample",
        vision_mode="dynamic_s2",
        s2_scales=(28, 56),
        s2_output_scale=-1,
        max_tiles=4,
        select_layer=-2,
        max_length_tokens=256,
        sampling=Sampling(4),
        video_pool_sizes=((2, 1, 1),),
    )
    tokenizer = train_tokenizer(texts, 300)
    save_native(init_model(config, tokenizer, seed=0), tokenizer, folder)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test can wait for."""
    monkeypatch.setattr(insist, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(insist, "READ_SECONDS", 0.4)  # a loaded machine must not be taken for a silent server
    monkeypatch.setattr(insist, "CONNECT_SECONDS", 1)


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> Iterator[Bucket]:
    """A bucket `b` with a checkpoint `m/`, and what must not be taken of it."""
    monkeypatch.setenv("NVILA_CACHE", str(tmp_path / "cache"))
    bucket = Bucket()
    for key, body in {
        "m/config.json": b"{}",
        "m/llm/model.safetensors": b"weights",
        "m/llm/merges.txt": b"a b",
        "m/modeling.py": b"raise SystemExit",
        "m/pytorch_model.bin": b"pickle",
        "mm/config.json": b"other",
    }.items():
        bucket.put(key, body)
    with served(bucket):
        for name, value in {
            "AWS_ENDPOINT_URL": bucket.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(tmp_path / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        }.items():
            monkeypatch.setenv(name, value)
        yield bucket
