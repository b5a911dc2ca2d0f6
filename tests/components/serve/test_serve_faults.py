"""The real vLLM behind the supervisor: a mixed load, and each process killed in turn with a stream under way."""

from __future__ import annotations

import base64
import json
import os
import random
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from load import Request, chat, mixed, part, run
from malformed import malformed
from PIL import Image
from servable import WITH_VLLM, clip, picture, servable_model

from nvila.components.contracts.errors import PreflightError
from nvila.components.serve import deployment
from nvila.components.serve.deployment import Guards, Status
from nvila.components.serve.ports import free_port
from nvila.pipelines.commands import endpoint

pytestmark = WITH_VLLM


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from nvila.components.model.checkpoint.serving import write_serving

    root = tmp_path_factory.mktemp("faults")
    model, tokenizer = servable_model()
    write_serving(model, tokenizer, root / "model", dtype=torch.float32)
    endpoint.serve(str(root / "model"), "127.0.0.1", free_port("127.0.0.1"), root, None, name="tiny")
    yield root
    endpoint.stop(root)


def status_of(runs: Path) -> Status:
    status = deployment.running(runs)
    assert status is not None
    return status


def processes(runs: Path, killed: psutil.Process | None = None) -> dict[str, psutil.Process]:
    """Of the endpoint, by what they are; waits until all are there and none is the one that was killed."""
    deadline = time.monotonic() + 60
    while True:
        try:
            found = _processes(runs)
            if killed not in found.values() and all(one.is_running() for one in found.values()):
                return found
        except (psutil.NoSuchProcess, AssertionError):  # the records are of a moment ago
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _processes(runs: Path) -> dict[str, psutil.Process]:
    status, guards = status_of(runs), deployment.read(runs, Guards)
    champion = status.of("champion")
    assert guards and champion and status.envoy and status.supervisor.pid == guards.guards[0][0]
    found = {"supervisor": guards.guards[0][0], "standby": guards.guards[1][0], "between": champion.pid}
    found |= {"server": champion.session, "envoy": status.envoy.session}
    named = {name: psutil.Process(pid) for name, pid in found.items()}
    for child in named["server"].children(recursive=True):
        title = " ".join(child.cmdline())
        named |= {name: child for name in ("EngineCore", "Worker") if f"VLLM::{name}" in title}
    assert "EngineCore" in named
    return named


def ask(url: str, stream: bool = False) -> str:
    body = {"model": "tiny", "prompt": "Which digit?", "max_tokens": 200 if stream else 2, "stream": stream}
    body |= {"ignore_eos": stream}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers=JSON)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())
    except OSError as error:
        return f"error: {error}"


JSON = {"Content-Type": "application/json"}


def bombs(folder: Path) -> list[Request]:
    """Small requests that ask for far more than they are: pixels, inner addresses, and last frames."""
    wide = folder / "wide.png"
    Image.new("1", (16_000, 16_000)).save(wide)
    frames = folder / "frames.gif"
    first, *others = [Image.new("P", (4000, 4000), shade) for shade in range(8)]
    first.save(frames, save_all=True, append_images=others * 60)
    data = base64.b64encode(frames.read_bytes()).decode()
    animation = {"type": "video_url", "video_url": {"url": f"data:image/gif;base64,{data}"}}
    inner = ("http://127.0.0.1:1\\@example.com/", "http://[::ffff:169.254.169.254]/", "http://2130706433/a.png")
    urls = [{"type": "image_url", "image_url": {"url": url}} for url in inner]
    return [replace(chat("tiny", what, "what?"), good=False) for what in (part(wide), *urls, animation)]


@pytest.mark.turns(3, 1)
def test_a_mixed_load_is_answered_and_refused(runs: Path, tmp_path: Path) -> None:
    """One user's malformed request, or bomb, was everybody's: the server ended, or nobody was answered for long."""
    media = [*(picture(tmp_path / f"{i}.png", i) for i in range(4)), clip(tmp_path / "a.mp4", 1)]
    bad = (Request(one.path, one.body, dict(one.headers), good=False) for one in malformed(11, 12, "tiny"))
    requests = [*mixed(11, 120, "tiny", media, bad), *bombs(tmp_path)]
    before = [one.pid for one in processes(runs).values()]
    replies = run(status_of(runs).url, requests, clients=16)
    if replies[-1].answered:  # by a machine that decodes its frames within the seconds that a medium may take
        requests, replies = requests[:-1], replies[:-1]
    lost = [reply for request, reply in zip(requests, replies, strict=True) if request.good and not reply.answered]
    let_in = [r for request, r in zip(requests, replies, strict=True) if not request.good and not 400 <= r.status < 500]
    assert lost == [] and let_in == []
    assert [one.pid for one in processes(runs).values()] == before


def test_new_pictures_of_many_at_a_time(runs: Path, tmp_path: Path) -> None:
    """A request that overtook the one that brought a picture was answered with 500: two in a hundred, here."""
    draw, asked = random.Random(3), []
    for turn in range(15):
        one, two = (part(picture(tmp_path / f"{turn}-{side}.png", 100 + 2 * turn + side)) for side in range(2))
        for shown in draw.choices([[one], [two], [one, two], [two, one]], k=16):
            asked.append(
                chat("tiny", *shown, "what is " * draw.randint(1, 20), max_tokens=1, stream=draw.random() < 0.4)
            )
    assert [reply for reply in run(status_of(runs).url, asked, clients=16) if not reply.answered] == []


@pytest.mark.turns(3, 2)
def test_every_process_may_be_killed(runs: Path) -> None:
    """Nothing came back after the engine had ended, and 2 GB of it stayed; seconds are printed and judge nothing."""
    url = status_of(runs).url
    assert "error" not in ask(url)
    ever = {*processes(runs).values()}
    for name in ("standby", "supervisor", "envoy", "EngineCore", "Worker", "server"):
        if (killed := processes(runs).get(name)) is None:  # on a CPU the engine may be its own worker
            continue
        threading.Thread(target=ask, args=(url, True), daemon=True).start()
        time.sleep(0.5)
        killed.kill()
        began = time.monotonic()
        psutil.wait_procs([killed], timeout=30)
        while "error" in ask(url):
            assert time.monotonic() - began < 400, deployment.tail(runs / "serving" / "supervisor.log", 40)
            time.sleep(0.2)
        print(f"{name}: answers {time.monotonic() - began:.1f} s after kill -9, load {os.getloadavg()[0]:.1f}")
        ever |= {*processes(runs, killed).values()}
    told = endpoint.look(runs)["endpoint"]
    assert told["healthy"] and told["restarts"]["envoy"] == 1 and told["restarts"]["supervisor"] == 1
    assert told["versions"][0]["restarts"] >= 2
    with pytest.raises(PreflightError, match="is being served"):
        endpoint.serve(str(runs / "model"), "127.0.0.1", int(url.rpartition(":")[2]), runs, None, name="another")
    assert endpoint.stop(runs)
    _, alive = psutil.wait_procs(list(ever), timeout=60)
    assert alive == [] and not endpoint.look(runs)["serving"]
