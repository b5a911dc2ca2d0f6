"""The real vLLM behind the supervisor: each process of it is killed in turn, with a stream under way."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from servable import WITH_VLLM, servable_model

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


def processes(runs: Path) -> dict[str, psutil.Process]:
    """Of the endpoint, by what they are."""
    status, guards = status_of(runs), deployment.read(runs, Guards)
    champion = status.of("champion")
    assert guards and champion and status.envoy
    found = {"supervisor": guards.guards[0][0], "standby": guards.guards[1][0], "between": champion.pid}
    found |= {"server": champion.session, "envoy": status.envoy.session}
    named = {name: psutil.Process(pid) for name, pid in found.items()}
    for child in named["server"].children(recursive=True):
        title = " ".join(child.cmdline())
        named |= {name: child for name in ("EngineCore", "Worker") if f"VLLM::{name}" in title}
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


def test_every_process_may_be_killed(runs: Path, record_property: object) -> None:
    """Nothing came back after the engine had ended, and 2 GB of it stayed; seconds are printed and judge nothing."""
    url = status_of(runs).url
    assert "error" not in ask(url)
    ever = {*processes(runs).values()}
    for killed in ("standby", "supervisor", "envoy", "EngineCore", "Worker", "server", "between"):
        before = processes(runs)
        if killed not in before:  # on one CPU the engine is its own worker
            continue
        threading.Thread(target=ask, args=(url, True), daemon=True).start()
        time.sleep(0.5)
        before[killed].kill()
        began = time.monotonic()
        psutil.wait_procs([before[killed]], timeout=30)
        while "error" in ask(url) or (killed in ("supervisor", "standby") and _guards(runs) == {before[killed].pid}):
            assert time.monotonic() - began < 400, deployment.tail(runs / "serving" / "supervisor.log", 40)
            time.sleep(0.2)
        print(f"{killed}: back after {time.monotonic() - began:.1f} s")
        deadline = time.monotonic() + 30
        while not (told := endpoint.look(runs))["serving"]:
            assert time.monotonic() < deadline, told
            time.sleep(0.2)
        ever |= {*processes(runs).values()}
    told = endpoint.look(runs)["endpoint"]
    assert told["healthy"] and told["restarts"]["envoy"] == 1 and told["restarts"]["supervisor"] == 1
    assert told["versions"][0]["restarts"] >= 3
    with pytest.raises(PreflightError, match="is being served"):
        endpoint.serve(str(runs / "model"), "127.0.0.1", int(url.rpartition(":")[2]), runs, None, name="another")
    assert endpoint.stop(runs)
    _, alive = psutil.wait_procs(list(ever), timeout=60)
    assert alive == [] and not endpoint.look(runs)["serving"]


def _guards(runs: Path) -> set[int]:
    guards = deployment.read(runs, Guards)
    return {pid for pid, _ in guards.guards} if guards else set()
