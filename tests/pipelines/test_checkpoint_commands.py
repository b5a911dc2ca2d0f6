"""`nvila convert`, `nvila inspect` and `nvila infer` over a toy checkpoint, as a user starts them."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvila.components.contracts.errors import ConfigError, DataError
from nvila.components.contracts.exits import Exit
from nvila.components.data.media import MediaError
from nvila.components.data.sampling import Sampling
from nvila.components.model.checkpoint.native import save_native
from nvila.components.model.config.config import ModelConfig
from nvila.components.model.fresh import init_model
from nvila.components.model.text.tokenizer import train_tokenizer
from nvila.pipelines.commands.ask import Answering, Question, infer

Nvila = Callable[..., subprocess.CompletedProcess[str]]
VISION = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
LLM = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(
        vision=VISION | {"image_size": 28, "patch_size": 14},
        llm=LLM | {"vocab_size": 300, "intermediate_size": 64, "tie_word_embeddings": True},
        projector="mlp_downsample",
        vision_mode="dynamic_s2",
        s2_scales=(28, 56),
        s2_output_scale=-1,
        max_tiles=6,
        select_layer=-2,
        max_length_tokens=256,
        sampling=Sampling(4),
        video_pool_sizes=((2, 1, 1),),
    )
    folder = tmp_path_factory.mktemp("toy")
    tokenizer = train_tokenizer(["which digit is in row two"], 300)
    save_native(init_model(config, tokenizer, 0), tokenizer, folder / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    (folder / "frames").mkdir()
    for index in range(3):
        Image.fromarray(pixels[index:]).save(folder / f"frames/{index}.png")
    return folder


def test_convert_inspect_and_infer(nvila: Nvila, toy: Path, tmp_path: Path) -> None:
    """Prevents the commands from disagreeing about a checkpoint: both layouts are described and answer the same."""
    done = nvila("convert", str(toy / "model"), "flat", "--to", "hf")
    assert done.returncode == 0 and "native to hf" in done.stdout
    shown, flat = nvila("inspect", str(toy / "model")).stdout, nvila("inspect", "flat").stdout
    assert "5 to 7 tokens" in shown and "none of the published ones" in shown
    differ = {a for a, b in zip(shown.splitlines(), flat.splitlines(), strict=True) if a != b}
    assert [line.split() for line in differ] == [["layout", "native"]]
    asked = ["--image", str(toy / "frames/0.png"), "Which digit?", "--max-new-tokens", "8"]
    answers = [nvila("infer", model, *asked) for model in (str(toy / "model"), "flat")]
    assert answers[0].returncode == 0 and answers[0].stdout == answers[1].stdout


def test_wrong_places_and_names(nvila: Nvila, toy: Path) -> None:
    """Prevents tracebacks for a place without a checkpoint and for an unknown layout."""
    for arguments in (("inspect", "nowhere"), ("convert", str(toy / "model"), "x", "--to", "gguf")):
        refused = nvila(*arguments)
        assert refused.returncode == Exit.USER and refused.stderr.startswith("nvila: ") and not refused.stdout


def test_infer_takes_media_in_order_and_several_questions(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents media from being sorted by kind, and a second question from forgetting the first and its answer."""
    from typer.testing import CliRunner

    from nvila.components.model.decode import answer
    from nvila.pipelines.cli import app

    prompts = []
    stream = answer.stream

    def listening(model: Any, tokenizer: Any, prompt: Any, *args: Any, **options: Any) -> Iterator[str]:
        prompts.append(prompt)
        return stream(model, tokenizer, prompt, *args, **options)

    monkeypatch.setattr(answer, "stream", listening)
    media = ["--video", str(toy / "frames"), "--image", str(toy / "frames/1.png"), "--video", str(toy / "frames")]
    asked = [str(toy / "model"), *media, "First?", "And <vila/video> here?", "--max-new-tokens", "6", "--system", ""]
    result = CliRunner().invoke(app, ["infer", *asked], catch_exceptions=False)
    assert result.exit_code == 0 and result.stdout.endswith("\n")
    first, second = prompts
    assert [visual.kind for visual in first.visuals] == ["video", "image"]
    assert [visual.kind for visual in second.visuals] == ["video", "image", "video"]
    assert [turn.role for turn in second.turns] == ["human", "gpt", "human"] and second.system == ""
    assert result.stdout == "".join(f"{text}\n" for text in (second.turns[1].text, result.stdout.splitlines()[-1]))


def test_infer_over_a_document_in_json(toy: Path, tmp_path: Path) -> None:
    """Prevents a schema or a document's pages from being dropped between the command line and the model, and an answer
    cut in the middle of its JSON from passing as one."""
    import json

    from typer.testing import CliRunner

    from nvila.pipelines.cli import app

    document, schema = tmp_path / "two.pdf", tmp_path / "schema.json"
    first, second = (Image.new("RGB", (60, 40), colour) for colour in ("red", "blue"))
    first.save(document, save_all=True, append_images=[second])
    schema.write_text('{"type": "object", "properties": {"row": {"enum": [1, 22]}}, "required": ["row"]}')
    asked = ["infer", str(toy / "model"), "--image", str(document), "Which?", "--json-schema", str(schema)]

    whole = CliRunner().invoke(app, [*asked, "--max-new-tokens", "60", "--image", f"{document}#page=2"])
    assert whole.exit_code == 0 and json.loads(whole.stdout)["row"] in (1, 22)
    cut = CliRunner().invoke(app, [*asked, "--max-new-tokens", "4"])
    assert isinstance(cut.exception, ConfigError) and "cut before its JSON ended" in str(cut.exception)
    missing = CliRunner().invoke(app, [*asked, "--image", f"{document}#page=3"])
    assert isinstance(missing.exception, DataError) and "3 of 2" in str(missing.exception)
    places = CliRunner().invoke(app, [*asked, "<image> <image> <image>?"])
    assert isinstance(places.exception, ConfigError) and "more places" in str(places.exception)
    text = CliRunner().invoke(app, ["infer", str(toy / "model"), "What is <image> in HTML?", "--max-new-tokens", "4"])
    assert text.exit_code == 0  # nothing is shown, so it is text
    schema.write_text('{"type": "row"}')
    wrong = CliRunner().invoke(app, asked)
    assert isinstance(wrong.exception, ConfigError) and "row" in str(wrong.exception)


def test_a_document_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    """A bomb was refused after minutes, when a model of 15B had been read."""
    document = tmp_path / "bomb.pdf"
    document.write_bytes(b"no document at all")
    with pytest.raises(
        MediaError, match="the PDF cannot be read"
    ):  # and nothing of the folder, which has no checkpoint
        next(infer(str(tmp_path), Question(["What?"], [("image", document)]), Answering(4), tmp_path))
