"""A serving pod's own command, run by the serving environment alone, with a stand-in for vLLM behind the real Envoy."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from servable import WITH_VLLM, servable_model
from stand_in import write_interpreter

from nvila.components.contracts.counters import Counters
from nvila.components.contracts.environment import for_child
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.modelrollout import PIN_HEADER
from nvila.components.model.checkpoint.serving import write_serving
from nvila.components.serve import deployment, exporter, interpreter
from nvila.components.serve.deployment import Status
from nvila.components.serve.exporter import Exporter, Told
from nvila.components.serve.ports import free_port
from nvila.infra.controller import scrape
from nvila.pipelines.commands.endpoint import Foreground


def sampled(text: str) -> list[Any]:
    """As Prometheus reads it."""
    from prometheus_client.parser import text_string_to_metric_families as parsed

    return [sample for family in parsed(text) for sample in family.samples]


QUESTION = {"messages": [{"role": "user", "content": [{"type": "text", "text": "how many?"}]}]}


@dataclass
class Pod:
    process: subprocess.Popen[bytes]
    runs: Path
    port: int
    metrics_port: int
    log: Path

    def get(self, port: int, path: str, headers: dict[str, str] | None = None, body: Any = None) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        try:
            connection.request("GET" if body is None else "POST", path, body and json.dumps(body), headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def ask(self, **headers: str) -> tuple[int, str]:
        return self.get(self.port, "/v1/chat/completions", headers, QUESTION)

    @property
    def told(self) -> tuple[Counters, int]:
        """As the controller reads it: the counters, and the restarts."""
        found = scrape.parse(self.get(self.metrics_port, "/metrics")[1], "7")
        assert found is not None
        return found

    @property
    def ready(self) -> bool:
        samples = {one.name: one.value for one in sampled(self.get(self.metrics_port, "/metrics")[1])}
        return samples["nvila_endpoint_ready"] == 1

    @property
    def idle_seconds(self) -> int:
        """How long its Envoy keeps a connection between two requests."""
        started = [one.cmdline() for one in psutil.Process(self.process.pid).children(recursive=True)]
        (bootstrap,) = {words[words.index("--config-path") + 1] for words in started if "--config-path" in words}
        (listener,) = json.loads(Path(bootstrap).with_name("listeners.json").read_text())["resources"]
        manager = listener["filter_chains"][0]["filters"][-1]["typed_config"]
        return int(manager["common_http_protocol_options"]["idle_timeout"].removesuffix("s"))

    def wait_for(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not there():
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the init container leaves: a manifest, and the folder `model` that it vouches for."""
    folder = tmp_path_factory.mktemp("served")
    write_serving(*servable_model(), folder / "model", dtype=torch.float32)
    (folder / "model" / "behaviour.json").write_text('{"default": "four"}')
    files = describe_files(folder)
    Manifest(step="quantize", key="0" * 20, kind="model", files=files).save(folder / "manifest.json")
    return folder


@pytest.fixture
def pod(served: Path, tmp_path: Path) -> Iterator[Pod]:
    port, metrics_port = free_port("127.0.0.1"), free_port("127.0.0.1")
    serving = interpreter.serve_python().with_name("nvila")
    stand_in = write_interpreter(tmp_path / "bin", interpreter.envoy())
    words = ["serve", str(served / "model"), "--foreground", "--port", str(port), "--runs", str(tmp_path / "runs")]
    words += ["--name", 'nvila "small"', "--version", "7", "--metrics-port", str(metrics_port)]
    words += ["--fallback", "nobody.invalid:8321"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(serving), *words], env=for_child({"NVILA_SERVE_PYTHON": str(stand_in)}), stdout=log, stderr=log
        )
    yield Pod(process, tmp_path / "runs", port, metrics_port, tmp_path / "log")
    process.terminate()
    process.wait(60)


@pytest.mark.slow
@WITH_VLLM[1]
def test_a_pod_serves_its_version_and_tells_of_itself(pod: Pod) -> None:
    """The image of the endpoint has the serving environment only: an import of another library ended every pod. A
    count that began anew with its server hid the failure that a rollout looks for."""
    pod.wait_for(lambda: pod.get(pod.port, "/health")[0] == 200)
    assert pod.get(pod.metrics_port, "/health")[0] == 200 and pod.get(pod.metrics_port, "/v1/models")[0] == 404
    status, body = pod.ask(**{PIN_HEADER: "7"})
    assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == "four"
    assert pod.ask()[0] == 200 and pod.ask(**{PIN_HEADER: "8"})[0] == 404
    assert pod.idle_seconds > 3600  # a Gateway closes an idle connection first, and sends nothing into its end
    before, restarts = pod.told
    assert pod.ready and (before.requests, before.errors, restarts) == (2, 0, 0)
    assert before.first_tokens == 2 and before.first_token_seconds > 0
    seen = deployment.read(pod.runs, Status)
    one = seen.of("champion") if seen else None
    assert one is not None and one.version.version == "7"
    psutil.Process(one.session).kill()
    pod.wait_for(lambda: pod.told[1] == 1)
    pod.wait_for(lambda: pod.ready)
    assert pod.ask()[0] == 200
    after, _ = pod.told
    assert (after.requests, after.first_tokens) == (3, 3)
    pod.process.send_signal(signal.SIGTERM)
    assert pod.process.wait(60) == 0, pod.log.read_text()


def test_what_a_pod_says_is_read_as_it_was_meant() -> None:
    """A name with a quote in it spoilt the whole text, for Prometheus and for the controller."""
    told = Told(Counters(9, 1, 8, 0.25, 30, 1.5e-05), restarts=2, ready=True, active=3)
    text = exporter.write(told, 'a "b" \\ c', "12")
    assert scrape.parse(text, "12") == (told.counters, 2) and scrape.parse(text, "1") is None
    samples = sampled(text)
    assert {(one.labels["model"], one.labels["version"]) for one in samples} == {('a "b" \\ c', "12")}
    assert {one.name: one.value for one in samples}["nvila_endpoint_token_seconds_total"] == 1.5e-05


def test_a_loop_that_hangs_is_no_health(tmp_path: Path) -> None:
    """A supervisor that hung would be asked for ever, and never started again."""
    assert Exporter(tmp_path, lambda: True).answer("/health")[0] == 200
    assert Exporter(tmp_path, lambda: False).answer("/health")[0] == 503


@pytest.mark.parametrize(
    ("stays", "given", "said"),
    [
        (False, {"version": "7"}, "--version: only an endpoint that stays"),
        (False, {"metrics_port": 9321}, "--metrics-port: only"),
        (True, {"fallback": "champion"}, "--fallback: not host:port"),
        (True, {"fallback": "http://champion:8321"}, "--fallback: not host:port"),
    ],
)
def test_what_would_have_no_effect_is_refused(stays: bool, given: dict[str, Any], said: str) -> None:
    """A pod whose second try leads nowhere looks like one that has a second try."""
    with pytest.raises(ConfigError, match=said):
        Foreground.of(stays, **given)
