"""What runs on CPUs in every other test, on a GPU: references trained and asked there, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nvila.components.contracts.environment import Environment
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.data.samples import read_samples, write_samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 200), "grey": (120, 120, 120)}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    """Pictures of one colour each, a question about each, and a model with random weights."""
    from PIL import Image

    from nvila.components.model.checkpoint.native import save_native
    from nvila.components.model.config.config import ModelConfig
    from nvila.components.model.config.variants import VARIANTS
    from nvila.components.model.fresh import init_model
    from nvila.components.model.text.tokenizer import train_tokenizer

    root = tmp_path_factory.mktemp("gpu")
    rows = []
    for split, count in {"sft": 400, "heldout": 80}.items():
        for n in range(count):
            colour = list(COLOURS)[n % 4]
            Image.new("RGB", (56, 28 + n % 3 * 28), COLOURS[colour]).save(root / f"{split}-{n}.png")
            rows.append(_row(root, split, n, colour))
    (root / "tables").mkdir()
    write_samples(root / "tables" / "samples.parquet", rows)
    vision = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 192}
    vision |= {"image_size": 28, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh"}
    llm: dict[str, Any] = {"vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    llm |= {"num_key_value_heads": 2, "intermediate_size": 256, "max_position_embeddings": 256, "rope_theta": 1e4}
    fields = {name: getattr(VARIANTS["NVILA-8B"], name) for name in ModelConfig.__dataclass_fields__}
    config = ModelConfig(
        **fields | {"vision": vision, "llm": llm | {"tie_word_embeddings": True}, "s2_scales": (28, 56)}
    )
    tokenizer = train_tokenizer(["Which colour is it?", *COLOURS], 300)
    save_native(init_model(config, tokenizer, seed=0), tokenizer, root / "made" / "model")
    return {
        "samples": _manifest("validate", "dataset", root / "tables"),
        "model": _manifest("initialize", "model", root / "made"),
    }


def test_losses_on_a_gpu_are_those_of_the_cpu(given: dict[str, Manifest]) -> None:
    """A score must not depend on where it was made: in float32 both agree, in bfloat16 to its precision."""
    from nvila.components.model.checkpoint.native import load_native
    from nvila.components.prune.scoring import Panel

    torch.backends.cuda.matmul.allow_tf32 = False
    samples = read_samples(given["samples"].path("samples.parquet"), split="sft")[:64]
    found = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        model, tokenizer = load_native(given["model"].dir("model"), dtype=dtype, device=device)
        (scored,) = Panel({"large": (model, tokenizer)}).score(samples, blind="large")
        found[device, dtype] = {
            (name, one): loss.nats for name, some in scored.losses.items() for one, loss in some.items()
        }
    for key, nats in found["cpu", "float32"].items():
        assert found["cuda", "float32"][key] == pytest.approx(nats, abs=1e-3)
        assert found["cuda", "bfloat16"][key] == pytest.approx(nats, rel=0.03)


def test_the_step_runs_on_a_gpu(given: dict[str, Manifest], tmp_path: Path) -> None:
    """CUDA does not survive a fork, and tensors that stay on the CPU are found only there: references are trained,
    judged and asked in spawned processes, and colours are soon learnt."""
    import pyarrow.parquet as parquet

    from nvila.components.prune import step

    sizes = {"hidden": 64, "layers": 1, "heads": 2, "kv_heads": 1, "mlp": 128}
    settings = step.Settings.model_validate(
        {
            "prune": {
                "compare": ["multimodal-gain", "clusters"],
                "small": {"decoder": sizes, "epochs": 0.2, "batch": 16},
                "large": {"decoder": sizes | {"layers": 2}, "epochs": 20, "batch": 16, "learning_rate": 3e-3},
            },
            "sources": ["colours"],
            "seed": 0,
            "max_skipped_share": 0,
        }
    )
    outcome = step.run(settings, given, tmp_path, Environment(run=tmp_path / "runs" / "r"))
    rows = parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    print(json.dumps({"judged": outcome.result.model_dump()["judged"], "measured": dict(outcome.measured)}))
    assert len(rows) == 400 and sum(row["kept"] for row in rows) == 200
    (judged,) = outcome.result.judged.values()
    assert judged.trusted, judged.why
    assert all(row["loss_large"] is not None and row["cluster"] >= 0 for row in rows)


def _row(root: Path, split: str, n: int, colour: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhich colour is it?"}, {"from": "gpt", "value": colour}]
    return {
        "id": f"colours/{split}/{n}",
        "source": "colours",
        "kind": "image",
        "split": split,
        "root": str(root),
        "media": [f"{split}-{n}.png"],
        "media_sha256": [""],
        "conversations": json.dumps(turns),
        "question": "Which colour is it?",
        "answer": colour,
        "line": n,
    }


def _manifest(step: Any, kind: Any, folder: Path) -> Manifest:
    return Manifest(step=step, key="0" * 64, kind=kind, files=describe_files(folder), folder=str(folder))
