"""`nvila finetune` for real: a registered model on one source without captions and labels. No vLLM, no server."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from turns import turn_of

from nvila.components.contracts.recipe.data import Source
from nvila.components.data.demo import ensure
from nvila.components.tracking.trace import trace
from nvila.pipelines.commands.finetune import start_from, with_ratio
from nvila.pipelines.commands.overrides import asked_for
from nvila.pipelines.planning.hits import verdicts

TUNED: dict[str, Any] = {
    "name": "mine",
    "model": {"base": {"model": "start"}},
    "data": {
        "sources": [{"name": "digits", "kind": "image", "path": "data/digits"}],
        "validation": {"max_quarantined_share": 0.25},
    },
    "train": {
        "precision": "fp32",
        "stages": [
            {
                "name": "fine-tuning",
                "trainable": ["vision_tower", "mm_projector", "llm"],
                "methods": {"vision_tower": "layernorm", "llm": "lora"},
                "learning_rate": 1e-3,
                "data": {"digits.sft": 1},
                "batch": 32,
            }
        ],
    },
    "evaluate": {"sources": ["digits"], "limit": 32, "gate": {"above_question_only": False, "least_questions": 10}},
    "quantize": {
        **{"method": "rtn", "group_size": 32, "calibration_samples": 8, "through_vllm": False},
        "gate": {"max_loss": 1.0, "least_questions": 10},
    },
    "rollout": {"target": "none"},
    "needs": {"memory_bytes": 2**30, "disk_bytes": 2**29},
}


def test_an_alias_alone_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that says `champion` would mean a folder of that name."""
    monkeypatch.chdir(tmp_path)
    assert [start_from(name, tmp_path) for name in ("", "hf://a/b@main", "m@champion", "m/3")] == [
        *("", "hf://a/b@main", "m@champion", "m/3")
    ]
    (tmp_path / "step" / "model").mkdir(parents=True)
    (tmp_path / "step" / "manifest.json").write_text("{}")
    assert start_from("step/manifest.json", tmp_path) == "step"


def test_the_rate_of_the_tower_is_a_share_of_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written as a number, the tower's rate stays behind when the stage's is changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(TUNED))
    changed = ["train.stages.train-1.learning_rate=2e-3"]
    assert with_ratio("mine.yaml", changed, 0.1, "")[1:] == ["train.stages.train-1.learning_rates.vision_tower=0.0002"]
    assert with_ratio("mine.yaml", changed, None, "") == changed


@pytest.mark.slow
@pytest.mark.skipif(not turn_of(3, 1), reason="its turn comes on another day: EVERY_TEST=1 runs it")
def test_a_model_is_fine_tuned_and_held_against_what_it_was(
    small_nvila: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of the other table with the real runner, on data that have questions and nothing else."""
    ensure(Source(name="digits", kind="image", path=str(tmp_path / "data/digits"), demo="digits", demo_scale=0.02))
    for name in ("captions", "labels"):
        (tmp_path / "data/digits" / f"{name}.json").unlink()
    shutil.copytree(small_nvila, tmp_path / "start")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(TUNED))
    summary = _finetune(tmp_path, "--vision-rate-ratio", "0.1")
    steps = {step["name"]: step["status"] for step in summary["steps"]}
    assert [name for name, status in steps.items() if status == "not asked for"] == ["train-2", "train-3"]
    assert not {"prune-image", "train-4"} & steps.keys() and set(summary["stages"]) == {"initialize", "train-1"}
    told = summary["accuracy"]["digits"]
    assert summary["pipeline"] == "finetune" and told["base"]["n"] == told["full"]["n"] == 32
    card = next((tmp_path / "store/register").glob("*/model_card.md")).read_text()
    assert "before tuning" in card and "Fine-tuned from `start`" in card
    tree = trace(tmp_path / "store", "nvila-mine/1", runs=tmp_path / "runs")
    assert tree.unchanged and {"initialize", "train-1"} <= {node.step for node in tree.nodes}
    # The same command again finds the work, and does not when the model is another.
    monkeypatch.chdir(tmp_path)
    overrides = with_ratio("mine.yaml", [], 0.1, "start")
    form, _ = asked_for("mine.yaml", overrides, start_from="start")
    found = verdicts(form, tmp_path / "store", tmp_path / "runs")
    assert {found[name] for name in ("initialize", "train-1", "evaluate", "quantize")} == {"hit"}
    (tmp_path / "start/llm/generation_config.json").write_text('{"temperature": 0.5}')
    assert verdicts(form, tmp_path / "store", tmp_path / "runs")["initialize"] == "miss"


NVILA = [sys.executable, "-m", "nvila.pipelines.cli"]


def _finetune(folder: Path, *options: str) -> dict[str, Any]:
    ended = subprocess.run(
        [*NVILA, "finetune", "mine.yaml", "--from", "start", *options], cwd=folder, capture_output=True, text=True
    )
    log = folder / "runs/latest/log.txt"
    assert ended.returncode == 0, ended.stderr + ended.stdout + (log.read_text()[-5000:] if log.is_file() else "")
    return dict(json.loads((folder / "runs/latest/summary.json").read_text()))


@pytest.fixture
def small_nvila(tmp_path: Path) -> Path:
    """A model of random weights that sees two scales, as `micro` makes one."""
    from nvila.components.contracts.recipe.form import Form, fill_in
    from nvila.components.initialize.scratch import decoder_config, tower_config
    from nvila.components.model.checkpoint.native import save_native
    from nvila.components.model.config.config import model_config
    from nvila.components.model.fresh import init_model
    from nvila.components.model.text.tokenizer import train_tokenizer

    settings = fill_in(Form(recipe="micro")).model
    tokenizer = train_tokenizer(["Which digit is in row 1, column 2? 0 1 2 3 4 5 6 7 8 9"], 512)
    tower = tower_config(settings.base.tower, settings.tile_pixels)
    config = model_config(settings, tower, decoder_config(settings.base.decoder, settings))
    save_native(init_model(config, tokenizer, 0), tokenizer, tmp_path / "made")
    return tmp_path / "made"
