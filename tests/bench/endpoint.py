"""The endpoint on a small model of random weights: what its walls cost, and what faults and rollouts cost its users."""

from __future__ import annotations

import itertools
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import psutil
from load import JSON, Reply, Request, Steady, chat, mixed, run, send, told
from malformed import malformed
from parameters import cases, contents, served, wrong
from servable import clip, picture, servable_model

from nvila.components.contracts.errors import Rejected
from nvila.components.contracts.recipe.rollout import Policy
from nvila.components.metrics.pinned import Pinned
from nvila.components.rollout.local import Candidate, reconcile
from nvila.components.serve import deployment, server
from nvila.components.serve.deployment import Status, Version
from nvila.components.serve.interpreter import serve_python, serve_variables
from nvila.components.serve.ports import free_port

Measured = tuple[str, str, float, float, str]
NAME = "small"
CLIENTS = 16
ROUNDS, ANSWERS = 5, 1280
REQUESTS = 1000


def rows() -> Iterator[Measured]:
    """Work, unit, baseline, ours, what the baseline is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = [_model(folder / f"model-{seed}", seed) for seed in (0, 1)]
        media = [
            *(picture(folder / f"{i}.png", i) for i in range(8)),
            *(clip(folder / f"{i}.mp4", i) for i in range(3)),
        ]
        with _endpoint(folder / "runs", models[0]) as (runs, url):
            yield from _overhead(runs, url, models[0], folder)
            yield from _mix(runs, url, media)
            yield from _kills(runs, url)
            yield from _rollouts(runs, url, models)
    yield _parameters()


def _overhead(runs: Path, url: str, model: Version, folder: Path) -> Iterator[Measured]:
    """Requests a second, and why: clients wait for the engine's steps, so it counts how many share one."""
    engine = _status(runs).of("champion")
    assert engine is not None
    with _bare(model, folder) as (bare, alone_pid):
        asked = {"alone": (bare, bare, [alone_pid]), "ours": (url, engine.url, [])}
        took: dict[str, list[float]] = {name: [] for name in asked}
        steps, front, every = (dict.fromkeys(asked, 0.0) for _ in range(3))
        for place, _, _ in asked.values():
            _seconds(place, 320)
        for turn in range(ROUNDS):
            for name in sorted(asked, reverse=turn % 2 == 1):
                place, metrics, pids = asked[name]
                processes = [psutil.Process(pid) for pid in pids] or _processes(runs)
                processes += [child for pid in pids for child in psutil.Process(pid).children(recursive=True)]
                before, counted = _cpu(processes), _steps(metrics)
                took[name].append(_seconds(place, ANSWERS))
                steps[name] += _steps(metrics) - counted
                front[name] += sum(s - before[p] for p, s in _cpu(processes).items() if not _is_engine(p))
                every[name] += sum(s - before[p] for p, s in _cpu(processes).items())
    count = ROUNDS * ANSWERS
    print({name: [round(ANSWERS / one) for one in took[name]] for name in asked}, "requests/s")
    print({name: round(count / steps[name], 2) for name in asked}, "requests a step of the engine")
    print({name: round(1000 * sum(took[name]) / steps[name], 1) for name in asked}, "ms a step")
    alone, ours = (statistics.median(took[name]) for name in ("alone", "ours"))
    yield f"Envoy and middleware, 16 clients, {ANSWERS} answers of 1 token", "s", alone, ours, "vLLM alone"
    alone, added = (1000 * seconds / count for seconds in (every["alone"], front["ours"] - front["alone"]))
    yield "CPU a request, with what Envoy, middleware and supervisor add", "ms", alone, alone + added, "vLLM alone"


def _steps(url: str) -> float:
    """That the engine of this server has taken."""
    with urlopen(f"{url}/metrics") as answer:
        found = re.findall(r"^vllm:iteration_tokens_total_count\S* (\S+)$", answer.read().decode(), re.MULTILINE)
    return sum(map(float, found))


def _cpu(processes: list[psutil.Process]) -> dict[psutil.Process, float]:
    return {one: sum(one.cpu_times()[:2]) for one in processes}


def _is_engine(process: psutil.Process) -> bool:
    return process.cmdline()[0].startswith("VLLM::")


def _seconds(url: str, count: int) -> float:
    """Of so many requests by 16 clients, each with a connection of its own that it keeps."""
    body = chat(NAME, "what is it", max_tokens=1).body
    parts = urlsplit(url)

    def ask(number: int) -> None:
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=120)
        for _ in range(count // CLIENTS):
            connection.request("POST", "/v1/chat/completions", body, JSON)
            answer = connection.getresponse()
            assert answer.read() and answer.status == 200
        connection.close()

    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask, range(CLIENTS)))
    return time.monotonic() - began


def _mix(runs: Path, url: str, media: list[Path]) -> Iterator[Measured]:
    bad = (Request(one.path, one.body, dict(one.headers), good=False) for one in malformed(0, REQUESTS, NAME))
    requests = mixed(0, REQUESTS, NAME, media, bad)
    before = _ends(runs)
    replies = run(url, requests[:200], CLIENTS)
    at_200 = _memory(runs)
    replies += run(url, requests[200:], CLIENTS)
    at_all = _memory(runs)
    good = [reply for request, reply in zip(requests, replies, strict=True) if request.good]
    refused = [reply for request, reply in zip(requests, replies, strict=True) if not request.good]
    print("statuses", told(good), told(refused))
    answered, turned_away = sum(r.answered for r in good), sum(400 <= r.status < 500 for r in refused)
    yield "mixed requests that are answered", "requests", len(good), answered, "all that are well formed"
    yield (
        "malformed requests that are refused with 4xx",
        "requests",
        len(refused),
        turned_away,
        "all that are malformed",
    )
    yield "restarts over all of them", "restarts", 1, _ends(runs) - before, "one"
    yield "memory of all processes after 1,000 requests", "MB", at_200 / 1e6, at_all / 1e6, "after 200"


def _kills(runs: Path, url: str) -> Iterator[Measured]:
    for what, find in VICTIMS.items():
        with Steady(url, _streams(), clients=2) as client:
            time.sleep(2)
            victim, known = find(runs), _processes(runs)
            os.kill(victim, signal.SIGKILL)
            began = time.monotonic()
            while psutil.pid_exists(victim) and time.monotonic() - began < 5:
                time.sleep(0.05)
            time.sleep(0.5)
            while not send(url, chat(NAME, "are you there", max_tokens=1), timeout_seconds=5).answered:
                assert time.monotonic() - began < 300, what
                time.sleep(0.2)
            back = time.monotonic() - began
        cleanly = [r for r in client.lost if r.status == 200 and b"[DONE]" in r.body]
        assert not cleanly, "a broken stream ended as if it were whole"
        yield f"back in service after kill -9 of the {what}", "s", 60.0, back, "a minute"
        time.sleep(3)
        here = {p.pid for p in _processes(runs)}
        orphans = [p for p in known if p.pid not in here and p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        yield f"orphans of that, after {time.monotonic() - began:.0f} s", "processes", 1, len(orphans), "one"


def _rollouts(runs: Path, url: str, models: list[Version]) -> Iterator[Measured]:
    policy = Policy(pinned_prompts=4, min_requests=40, min_seconds=5, steps=[10, 50], min_agreement=1.0)
    port = int(url.rpartition(":")[2])
    for what, version, answer in (("good", models[1], ""), ("worse", models[0], "no answer of it")):
        with Steady(url, _streams(), clients=4) as client:
            asked = [f"which digit is {number}" for number in range(4)]
            with _alone(version, runs) as own:
                expected = [answer or server.ask(own, NAME, question).text for question in asked]
            prompts = [Pinned(q, (q,), said, said) for q, said in zip(asked, expected, strict=True)]
            began = time.monotonic()
            try:
                reconcile(runs, Candidate(version, "127.0.0.1", port), prompts, policy, "side-by-side", 32)
                outcome = "promoted"
            except Rejected as error:
                outcome = f"rejected: {error.what}"
            print(what, outcome, f"{time.monotonic() - began:.0f} s")
        ours = [reply for reply in client.lost if not _begun(reply)]
        yield (
            f"requests lost of a steady client's {len(client.replies)}, a {what} version",
            "requests",
            1,
            len(ours),
            "one",
        )


def _parameters() -> Measured:
    """Every documented parameter with each kind of content."""
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as started:
        every = list(cases(contents(Path(name))))
        found = [said for case in every if (said := wrong(started.url, case))]
    print("\n".join(found))
    return "requests that end the server or get no proper answer", "requests", len(every), len(found), "all of them"


def _begun(reply: Reply) -> bool:
    return reply.status == 200 and b"data:" in reply.body


def _streams() -> Iterator[Request]:
    return (chat(NAME, f"what is {number}", stream=number % 2 == 0, max_tokens=8) for number in itertools.count())


def _model(folder: Path, seed: int) -> Version:
    import torch

    from nvila.components.model.checkpoint.serving import write_serving

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    write_serving(*servable_model(), folder, dtype=torch.float32)
    return Version(name=NAME, version=str(seed + 1), digest=f"{seed}", model_dir=str(folder))


@contextmanager
def _endpoint(runs: Path, version: Version) -> Iterator[tuple[Path, str]]:
    port = free_port("127.0.0.1")
    try:
        with deployment.exclusive(runs):
            wanted = deployment.change(runs, host="127.0.0.1", port=port, champion=version)
            deployment.ensure_supervisor(runs, None)
        yield runs, deployment.wait_for(runs, wanted.generation, _ready, 300).url
    finally:
        with deployment.exclusive(runs):
            deployment.end(runs)


def _ready(status: Status) -> bool:
    champion = status.of("champion")
    return champion is not None and champion.state == "ready"


@contextmanager
def _bare(model: Version, folder: Path) -> Iterator[tuple[str, int]]:
    """vLLM alone, with the same engine: its URL, and its process."""
    port = free_port("127.0.0.1")
    command = [str(serve_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", model.model_dir]
    command += [f"--served-model-name={NAME}", "--host", "127.0.0.1", "--port", str(port), *server.ENGINE_OPTIONS]
    with (folder / "bare.log").open("wb") as log:
        child = subprocess.Popen(command, env=serve_variables(), stdout=log, stderr=log, start_new_session=True)
    try:
        server.wait_ready(f"http://127.0.0.1:{port}", 300, child.pid, folder / "bare.log")
        yield f"http://127.0.0.1:{port}", child.pid
    finally:
        server.stop(child.pid)


@contextmanager
def _alone(version: Version, runs: Path) -> Iterator[str]:
    """A server of its own, for what the evaluation would have on record."""
    log = runs / "alone.log"
    started = server.start(Path(version.model_dir), port=free_port("127.0.0.1"), served_name=NAME, log_path=log)
    try:
        server.wait_ready(started.url, 300, started.pid, log)
        yield started.url
    finally:
        server.stop(started.pid)


def _status(runs: Path) -> Status:
    status = deployment.read(runs, Status)
    assert status is not None
    return status


def _processes(runs: Path) -> list[psutil.Process]:
    """All that belongs to the endpoint."""
    status, guards = _status(runs), deployment.read(runs, deployment.Guards)
    sessions = {program.session for program in status.programs} | {program.pid for program in status.programs}
    sessions |= {pid for pid, _ in guards.guards} if guards else set()
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid in sessions or os.getsid(process.pid) in sessions:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


def _memory(runs: Path) -> float:
    return float(sum(process.memory_full_info().pss for process in _processes(runs)))


def _ends(runs: Path) -> int:
    status = _status(runs)
    return status.restarts + status.envoy_restarts + sum(one.restarts for one in status.versions)


def _named(word: str) -> Callable[[Path], int]:
    def find(runs: Path) -> int:
        return next(p.pid for p in _processes(runs) if word in " ".join(p.cmdline()))

    return find


VICTIMS: dict[str, Callable[[Path], int]] = {
    "engine": _named("EngineCore"),
    "worker": _named("VLLM::Worker"),
    "API server": lambda runs: next(
        p.pid for p in _processes(runs) if "api_server" in " ".join(p.cmdline()) and "children.py" not in p.cmdline()[2]
    ),
    "process between": lambda runs: next(one.pid for one in _status(runs).versions),
    "Envoy": lambda runs: _status(runs).envoy.session,  # type: ignore[union-attr]
    "supervisor": lambda runs: _status(runs).supervisor.pid,
    "process that stands by": lambda runs: next(
        pid
        for pid, _ in deployment.read(runs, deployment.Guards).guards
        if pid != _status(runs).supervisor.pid  # type: ignore
    ),
}
"""What is killed."""
