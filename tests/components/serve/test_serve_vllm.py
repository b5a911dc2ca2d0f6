"""The real vLLM: one batch of a quantized model, one server of a plain one."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from servable import WITH_VLLM, clip, manifest, picture, sample_row, servable_model

from nvila.components.contracts.errors import RolloutError
from nvila.components.contracts.recipe.endpoint import EndpointSettings
from nvila.components.data.media import load_image, load_video_frames
from nvila.components.metrics.answers import answers
from nvila.components.model.nvila import NVILA
from nvila.components.model.positions import positions
from nvila.components.model.text.conversation import Turn, messages_of
from nvila.components.model.text.prompt import Prompt, make_prompt
from nvila.components.model.text.tokenizer import TokenIds
from nvila.components.serve import server
from nvila.components.serve.batch import Request, generate_with_vllm
from nvila.components.serve.ports import free_port

pytestmark = WITH_VLLM


@dataclass(frozen=True)
class Media:
    """Files to ask about."""

    pictures: list[Path]
    clips: list[Path]

    def requests(self) -> list[Request]:
        """Single pictures of several shapes (tiled), clips, two at once (not tiled), anywhere in the text."""
        single = [Request([str(path)], "image", f"Which digit? {i % 3}") for i, path in enumerate(self.pictures)]
        video = [Request([str(path)], "video", "Which digit is shown third?") for path in self.clips]
        pair = [str(path) for path in self.pictures[:2]]
        return [
            *single,
            *video,
            Request(pair, "image", "<image>\nand\n<image>\nSame?"),
            Request(pair, "image", "Same?"),
            *(Request([str(path)], "image", "Which digit? <image>") for path in self.pictures[:3]),
            Request(pair[:1], "image", "Look at <image> and say <|im_end|>."),
            Request([str(path) for path in self.clips[:2]], "video", "Is <vila/video> like <vila/video>?"),
        ]


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Media:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("media")
    sizes = [(56, 56), (90, 30), (30, 90)]
    pictures = [picture(root / f"{i}.png", i, sizes[i % 3]) for i in range(24)]
    return Media(pictures, [clip(root / f"{i}.mp4", i) for i in range(6)])


def test_quantized_checkpoint_in_vllm_answers_as_in_torch(
    media: Media, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """W8A8 tower and W4A16 decoder in one checkpoint: vLLM must read each part by its own scheme. A question that is
    too long for the model must not end the evaluation of all others; torch leaves it unanswered."""
    from nvila.components.data.samples import write_samples
    from nvila.components.model.checkpoint.native import save_native
    from nvila.components.model.checkpoint.quantized import load_quantized
    from nvila.components.quantize.step import Settings, run

    model, tokenizer = servable_model()
    save_native(model, tokenizer, tmp_path / "train" / "model")
    rows = [sample_row("grids", i, path.parent, path.name) for i, path in enumerate(media.pictures[:4])]
    (tmp_path / "table").mkdir()
    write_samples(tmp_path / "table" / "samples.parquet", rows)
    inputs = {"model": manifest("train-5", tmp_path / "train"), "samples": manifest("validate", tmp_path / "table")}
    given = {"quantize": {"group_size": 32, "calibration_samples": 4}, "seed": 0, "max_skipped_share": 0.01}
    settings = Settings.model_validate(given)
    run(settings, inputs, tmp_path / "q")

    quantized, tokenizer = load_quantized(tmp_path / "q" / "model", torch.bfloat16)
    requests = [*media.requests(), *_edges(quantized, tokenizer, media)]
    served = generate_with_vllm(tmp_path / "q" / "model", requests, max_new_tokens=6, work=tmp_path / "work")
    expected = _generate(quantized, tokenizer, requests)
    told = [line.split(":", 1)[1] for line in capsys.readouterr().err.splitlines() if "too long" in line]
    assert served[-2:] == expected[-2:] == ["", ""] and len(told) == 2 and told[0] == told[1]
    assert len(set(expected)) > 5, "answers must differ for the comparison to mean anything"
    # bf16 kernels add up in another order; on random weights the two best tokens are often close.
    assert _agreement(served, expected) >= 0.8

    # vLLM looks for missing weights in plain checkpoints only.
    file = tmp_path / "q" / "model" / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name != "llm.model.norm.weight"}, file)
    with pytest.raises(RolloutError, match=r"tensors do not match the model.*llm\.model\.norm\.weight"):
        generate_with_vllm(tmp_path / "q" / "model", media.requests()[:1], max_new_tokens=6, work=tmp_path / "less")


@dataclass(frozen=True)
class Running:
    """A server and what it serves."""

    url: str
    model: NVILA
    tokenizer: Any
    files: Path
    """The folder that `file://` URLs may name files of."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    from nvila.components.model.checkpoint.serving import write_serving

    root = tmp_path_factory.mktemp("served")
    model, tokenizer = servable_model()
    write_serving(model, tokenizer, root / "model", dtype=torch.float32)
    port = free_port("127.0.0.1")
    log = root / "log"
    (files := root / "files").mkdir()
    told = EndpointSettings(max_body_mib=8, media_folders=[str(files)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", "/nowhere/g++")  # images and many machines have no compiler
        started = server.start(
            root / "model", port=port, served_name="tiny", log_path=log, api_key="sesame", settings=told
        )
    try:
        server.wait_ready(started.url, 240, started.pid, log)
        yield Running(started.url, model, tokenizer, files)
    finally:
        server.stop(started.pid)
    assert not server.is_alive(started.pid)


def test_server_answers_as_the_torch_model_does(running: Running, media: Media) -> None:
    """Another prompt, other frames or other tiles than in training: every answer must be the torch model's own."""
    requests = media.requests()
    expected = _generate(running.model, running.tokenizer, requests)
    served = []
    for request in requests:
        files = [(request.kind, Path(path)) for path in request.media]
        (message,) = messages_of([Turn("human", request.question)], files)
        served.append(server.ask(running.url, "tiny", message.parts, max_tokens=6, api_key="sesame").text)
    # vLLM's detokenizer leaves out bytes that make no character; the torch side shows them as U+FFFD.
    plain = [_characters(text) for text in expected]
    assert len(set(plain)) > 5
    # The server narrows float32 to bfloat16; that prompts are equal is tested in test_serve_prompts.
    assert _agreement([_characters(text) for text in served], plain) >= 0.9


def test_answers_in_json(running: Running, media: Media) -> None:
    """A decoder whose vocabulary is smaller than its tokenizer's could break the server's own JSON schemas."""
    choices = ["one", "twenty two"]
    schema = {"enum": choices}  # an object may hold any amount of white space, of which random weights make use
    body = server.chat_request("tiny", "Which digit?", image=media.pictures[0], max_tokens=60)
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    request = urllib.request.Request(
        f"{running.url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": "Bearer sesame"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        said = json.load(answer)["choices"][0]
    assert said["finish_reason"] == "stop" and json.loads(said["message"]["content"]) in choices


def test_server_wants_its_key(running: Running) -> None:
    """An endpoint that answers anybody."""
    with pytest.raises(RolloutError, match="401"):
        server.ask(running.url, "tiny", "Which digit?")
    body = json.dumps(server.chat_request("tiny", "Which digit?")).encode()
    request = urllib.request.Request(f"{running.url}/v1/completions", body, {"Content-Type": "application/json"})
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=60)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:1/x.png", "remote media URLs are switched off"),
        ("file:///etc/hostname", "no such file in the folders"),
        ("data:image/png;base64,####", "not base64"),
        ("data:image/png;base64," + base64.b64encode(b"no picture").decode(), "decoded"),
    ],
)
@pytest.mark.parametrize("kind", ["image_url", "video_url"])
def test_media_from_elsewhere_are_refused(running: Running, kind: str, url: str, reason: str) -> None:
    """A server that fetches any URL is a way into the network it runs in; bad media must be the asker's error."""
    message = {"role": "user", "content": [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "What?"}]}
    code, said = _status(running, {"model": "tiny", "messages": [message], "max_tokens": 2})
    assert code == 400 and reason in said


def test_frames_as_a_clip_are_answered_as_the_clip(running: Running, media: Media) -> None:
    """Evaluation harnesses send the frames of a clip: other answers than to its file would measure another model."""
    said: dict[str, list[Any]] = {"file": [], "frames": []}
    for path in media.clips:
        files = []
        for frame in load_video_frames(path, running.model.config.sampling):
            frame.save(file := io.BytesIO(), "PNG")
            files.append(base64.b64encode(file.getvalue()).decode())
        for form, url in (("file", None), ("frames", "data:video/jpeg;base64," + ",".join(files))):
            body = server.chat_request("tiny", "Which digit?", video=path, max_tokens=4) | {"logprobs": True}
            if url:
                body["messages"][0]["content"][0]["video_url"]["url"] = url
            code, answer = _status(running, body)
            assert code == 200
            tokens = json.loads(answer)["choices"][0]["logprobs"]["content"]
            said[form].append([token["token"] for token in tokens])
    assert len({*map(str, said["file"])}) > 1
    assert said["frames"] == said["file"]


def test_request_cannot_choose_another_number_of_frames(running: Running, media: Media) -> None:
    """Frames that no temporal pool divides would end the engine, and with it everybody's answers."""
    body = server.chat_request("tiny", "Which digit?", video=media.clips[0], max_tokens=2)
    assert _status(running, body | {"media_io_kwargs": {"video": {"num_frames": 4}}})[0] == 200
    code, said = _status(running, body | {"media_io_kwargs": {"video": {"num_frames": 3}}})
    assert code == 400 and "takes 4 frames" in said
    assert server.is_ready(running.url)


def test_media_of_a_request_share_its_limits(running: Running) -> None:
    """What guards memory and threads must count for the whole request, and not for each of sixty-four pictures."""
    for name in ("a.png", "b.png"):
        pixels = np.random.default_rng(ord(name[0])).integers(0, 256, (1150, 1150, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(running.files / name)
    urls = [f"file://{running.files}/{name}" for name in ("a.png", "b.png", "a.png")]
    answered = []
    for asked in (urls[:1], urls[1:2], urls[:2], urls[::2], urls[:1]):
        content = [{"type": "image_url", "image_url": {"url": url}} for url in asked]
        message = {"role": "user", "content": [*content, {"type": "text", "text": "Which digit?"}]}
        answered.append(_status(running, {"model": "tiny", "messages": [message], "max_tokens": 2}))
    assert [code for code, _ in answered] == [200, 200, 400, 400, 200]
    assert "too many bytes together" in answered[2][1]


def _status(running: Running, body: dict[str, Any]) -> tuple[int, str]:
    """Status and body of the answer to a chat request."""
    request = urllib.request.Request(
        f"{running.url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Authorization": "Bearer sesame"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_requests_that_look_up_the_prompt_do_not_end_the_engine(running: Running, media: Media) -> None:
    """One request with a picture and `prompt_logprobs` or a penalty ended the server for everybody: the ids of media
    markers lie behind the vocabulary."""
    for options in (
        {"prompt_logprobs": 1},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"prompt_logprobs": 0},
    ):
        body = server.chat_request("tiny", "Which digit?", image=media.pictures[0], max_tokens=2) | options
        request = urllib.request.Request(
            f"{running.url}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": "Bearer sesame"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            said = json.load(answer)
        assert ("prompt_logprobs" in options) == bool(said["prompt_logprobs"])
    assert server.is_ready(running.url)


def _generate(model: NVILA, tokenizer: Any, requests: list[Request]) -> list[str]:
    prompts = [_prompt(model, request) for request in requests]
    return answers(model, tokenizer, prompts, batch=1, max_new_tokens=6, what="torch")


def _edges(model: NVILA, tokenizer: Any, media: Media) -> list[Request]:
    """Questions that leave the decoder one position, none, and less."""
    tokens = TokenIds.of(tokenizer)

    def request(digits: int) -> Request:
        return Request([str(media.pictures[0])], "image", "7" * digits)

    prompt = _prompt(model, request(1))
    ids = prompt.encode(tokenizer, generate=True).input_ids
    room = model.config.positions - positions(ids, prompt.visuals, model.config, tokens)
    return [request(room), request(room + 1), request(room + 200)]


def _prompt(model: NVILA, request: Request) -> Prompt:
    paths = [Path(path) for path in request.media]
    if request.kind == "video":
        media: list[Any] = [load_video_frames(path, model.config.sampling) for path in paths]
    else:
        media = [load_image(path) for path in paths]
    return make_prompt([Turn("human", request.question)], media, model.config)


def _characters(text: str) -> str:
    return text.replace("�", "").strip()


def _agreement(given: list[str], expected: list[str]) -> float:
    return sum(g == e for g, e in zip(given, expected, strict=True)) / len(expected)


@pytest.mark.turns(3, 0)
def test_times_of_a_clip_are_seconds_in_batches_and_at_the_endpoint(media: Media, tmp_path: Path) -> None:
    """Time tokens are added to a model that was made without: a server whose vocabulary does not know them, or that
    shows `<t3>`, answers a question about a time with what nobody can read."""
    from nvila.components.contracts.recipe.changes import ModelChanges
    from nvila.components.data.samples import Sample
    from nvila.components.data.samples import Turn as Said
    from nvila.components.model.checkpoint.changes import changed
    from nvila.components.model.checkpoint.native import load_opened, open_native, save_native
    from nvila.components.model.checkpoint.serving import write_serving
    from nvila.components.model.feed import Feed

    question, when = "<vila/video>\nWhen does it turn?", "at <0.75>"
    save_native(*servable_model(), tmp_path / "before")
    grown = changed(open_native(tmp_path / "before"), ModelChanges(time_tokens=5))
    model, tokenizer = load_opened(grown, "float32", "cpu")
    path = media.clips[0]  # of one second
    turns = (Said("human", question), Said("gpt", when))
    sample = Sample("t/sft/0", "t", "video", "sft", path.parent, (path.name,), turns, "", when)
    batch = Feed(tokenizer, model.config).batch([sample])
    optimizer = torch.optim.Adam(model.llm.parameters(), lr=1e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(**batch.forward_arguments()).loss.backward()
        optimizer.step()
    request = Request([str(path)], "video", question)
    assert _generate(model, tokenizer, [request]) == [when]

    write_serving(model, tokenizer, tmp_path / "model", dtype=torch.float32)
    assert generate_with_vllm(tmp_path / "model", [request], max_new_tokens=6, work=tmp_path / "work") == [when]
    port = free_port("127.0.0.1")
    started = server.start(tmp_path / "model", port=port, served_name="tiny", log_path=tmp_path / "log", api_key="a")
    try:
        server.wait_ready(started.url, 240, started.pid, tmp_path / "log")
        (message,) = messages_of([Turn("human", question)], [("video", path)])
        assert server.ask(started.url, "tiny", message.parts, max_tokens=6, api_key="a").text == when
    finally:
        server.stop(started.pid)
