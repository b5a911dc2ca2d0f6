"""The step through torchrun and DeepSpeed, and what it makes of folders that earlier attempts left."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.sealed import seal
from nvila.components.contracts.steps import PRUNE_IMAGE, PRUNE_VIDEO
from nvila.components.train import step
from nvila.components.train.job import RECORD, TRAINED
from nvila.components.train.losses import read_losses

ROW: dict[str, Any] = {
    "name": "video instruction tuning",
    "trainable": ["mm_projector", "llm"],
    "learning_rate": 1e-3,
    "data": {"clips.sft": 10, "colours.sft": 5},
    "batch": 8,
}
STEPS = 25
RUN = """
import json, signal, sys
from pathlib import Path
from nvila.components.contracts.errors import Preempted
from nvila.components.contracts.manifest import Manifest
from nvila.components.contracts.sealed import seal
from nvila.components.train import step
from nvila.components.train.job import RECORD, TRAINED
settings, model, samples, out = sys.argv[1:]
inputs = {"model": Manifest.model_validate_json(model), "samples": Manifest.model_validate_json(samples)}
try:
    step.run(step.Settings.model_validate_json(settings), inputs, Path(out))
except Preempted as error:
    print(error)
    sys.exit(75)
"""


def settings(**run: Any) -> step.Settings:
    how = {"precision": "fp32", "zero": 0, "gpus": 1, "checkpoint_seconds": 0.0} | run
    return step.Settings.model_validate({"stage": ROW, "run": how, "seed": 0})


def inputs(small: Any) -> dict[str, Manifest]:
    return {"model": small.model, "samples": small.samples}


@pytest.mark.slow
def test_a_stage_is_stopped_and_ends_on_the_second_call(small: Any, tmp_path: Path) -> None:
    """The whole way: torchrun, a signal in the middle, a resume, and exactly the files that the next stage reads."""
    given = [settings().model_dump_json(), small.model.model_dump_json(), small.samples.model_dump_json()]
    process = subprocess.Popen([sys.executable, "-c", RUN, *given, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    reached = len(read_losses(tmp_path / "loss.jsonl"))
    assert 1 <= reached < STEPS
    assert not (tmp_path / "model").exists()

    outcome = step.run(settings(), inputs(small), tmp_path)
    records = read_losses(tmp_path / "loss.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert (outcome.result.steps, outcome.result.samples) == (STEPS, STEPS * 8)
    assert outcome.result.final_loss == pytest.approx(sum(r["loss"] for r in records[-2:]) / 2, abs=1e-4)
    assert set(describe_files(tmp_path, outcome.files)) == {
        "loss.jsonl",
        "loss.png",
        "skipped.jsonl",
        "model/config.json",
        "model/llm/added_tokens.json",
        "model/llm/config.json",
        "model/llm/generation_config.json",
        "model/llm/merges.txt",
        "model/llm/model.safetensors",
        "model/llm/special_tokens_map.json",
        "model/llm/tokenizer.json",
        "model/llm/tokenizer_config.json",
        "model/llm/vocab.json",
        "model/mm_projector/config.json",
        "model/mm_projector/model.safetensors",
        "model/vision_tower/config.json",
        "model/vision_tower/model.safetensors",
        "model/vision_tower/preprocessor_config.json",
    }
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "model.partial").exists()


def finished(out: Path, small: Any) -> None:
    """A folder as of a stage that ended, just before its manifest."""
    shutil.copytree(small.model.dir("model"), out / "model")
    rows = [json.dumps({"step": n, "loss": 2.0 - n / 100, "lr": 0.1, "tokens": 9}) for n in range(1, STEPS + 1)]
    (out / "loss.jsonl").write_text("\n".join(rows) + "\n")
    seal(out, out / RECORD, TRAINED)


def test_a_stage_killed_before_its_manifest_is_not_trained_again(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is there and whole: training it again costs the stage a second time."""
    finished(tmp_path, small)
    monkeypatch.setattr(step, "launch", lambda job: pytest.fail("trained again"))
    first = step.run(settings(), inputs(small), tmp_path).result
    assert first.steps == STEPS
    assert step.run(settings(), inputs(small), tmp_path).result == first


def _torn(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _linked(file: Path) -> None:
    file.rename(file.parents[2] / "elsewhere")
    file.symlink_to(file.parents[2] / "elsewhere")


def _joined(file: Path) -> None:
    shutil.copy(file, file.with_name("model-00002-of-00002.safetensors"))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("model/llm/model.safetensors", damage) for damage in (_torn, _flipped, Path.unlink, _linked, _joined)),
        *((RECORD, damage) for damage in (_torn, _flipped, Path.unlink)),
    ],
)
def test_a_model_that_is_not_as_it_was_written_is_made_again(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Path], None]
) -> None:
    """After a power cut the folder of a finished model may hold files of zeros; the next stage trained on them."""
    finished(tmp_path, small)
    damage(tmp_path / name)
    launched: list[Any] = []
    monkeypatch.setattr(step, "launch", launched.append)
    step.run(settings(), inputs(small), tmp_path)
    assert len(launched) == 1


def test_a_lost_loss_log_is_made_again(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged log must neither crash every later attempt nor leave a stage of no steps."""
    finished(tmp_path, small)
    whole = (tmp_path / "loss.jsonl").read_text()
    (tmp_path / "loss.jsonl").write_text("\0\0\0")
    launched = []

    def launch(job: Any) -> None:
        launched.append(job)
        (tmp_path / "loss.jsonl").write_text(whole)

    monkeypatch.setattr(step, "launch", launch)
    assert step.run(settings(), inputs(small), tmp_path).result.steps == STEPS
    assert len(launched) == 1


def test_score_tables_reach_the_job(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pruned stage whose tables are lost on the way trains on nothing, or on everything."""
    finished(tmp_path, small)
    (tmp_path / step.RECORD).unlink()
    tables = {}
    for name, made in (("kept_video", PRUNE_VIDEO), ("kept_image", PRUNE_IMAGE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.parquet").touch()
        files = describe_files(tmp_path / name)
        tables[name] = Manifest(step=made, key=name, kind="dataset", files=files, folder=str(tmp_path / name))
    jobs: list[Any] = []
    monkeypatch.setattr(step, "launch", jobs.append)
    step.run(settings(), inputs(small) | tables, tmp_path)
    assert [Path(table).parent.name for table in jobs[0].kept] == ["kept_image", "kept_video"]


def test_a_stage_goes_on_after_a_change_of_how_it_is_done() -> None:
    """A stage that lost a GPU, or did not fit one, began anew; or one of other weights was taken for it."""

    def keyed(stage: dict[str, Any] | None = None, **run: Any) -> Any:
        changed = {"stage": ROW | (stage or {}), "run": {"precision": "bf16"} | run, "seed": 0}
        return step.keyed(step.Settings.model_validate(changed).model_dump(mode="json"))

    how = {"gpus": 2, "checkpoint_seconds": 9.0, "keep_checkpoints": 5, "keep_best": False, "loader_processes": 3}
    assert keyed({"micro_batch": 2, "gradient_checkpointing": True}, **how) == keyed()
    assert keyed({"learning_rate": 1e-4}) != keyed()
    assert keyed(packing="padded") != keyed()
    large, fp8 = {"fp8": {"min_features": 32}}, {"precision": "fp8-current"}
    assert keyed(**large) == keyed()
    assert keyed(**fp8, **large) != keyed(**fp8) != keyed()
    by_batch = {"loss_weighting": "device_batch"}
    assert keyed(**by_batch, gpus=2) != keyed(**by_batch)
    assert keyed({"micro_batch": 2}, **by_batch) != keyed(**by_batch)
