"""A real MLflow server that may be killed, and versions in it as `register` lays them out, each with a behaviour."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import elsewhere  # noqa: F401

from nvila.components.contracts.addresses import sqlite_url
from nvila.components.contracts.environment import for_child
from nvila.components.contracts.manifest import Manifest, describe_files
from nvila.components.contracts.modelrollout import PINNED_FILE
from nvila.components.register.package import log_model
from nvila.components.serve.ports import free_port
from nvila.components.serve.server import chat_request, wait_ready
from nvila.components.tracking.connect import load_client
from nvila.components.tracking.registry import DECISION_TAG, keep_pinned, lineage_tags, register_version
from nvila.components.tracking.runs import open_step

PINNED = tuple(f"pinned question {number}" for number in range(4))
TOKENS = 4
PATIENCE_SECONDS = 90.0


class Registry:
    """On an address of this machine that pods reach; its artifacts go through it."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder, self._address, self._port = folder, address, free_port(address)
        self._kept = folder / "artifacts"
        self._runs = folder / "runs"
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """For `MLFLOW_TRACKING_URI`."""
        return f"http://{self._address}:{self._port}"

    def start(self) -> None:
        """Start it, or start it again with what it had."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", self._address, "--port", str(self._port)]
        command += ["--workers", "1", "--backend-store-uri", sqlite_url(self._folder / "mlflow.db")]
        command += ["--serve-artifacts", "--artifacts-destination", str(self._kept)]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "mlflow.log").open("ab") as log:
            self._server = subprocess.Popen(
                command, stdout=log, stderr=log, env=for_child(quiet), start_new_session=True
            )
        wait_ready(self.url, 180, self._server.pid, self._folder / "mlflow.log")

    def kill(self) -> None:
        """End all its processes in the middle of whatever they do."""
        if self._server:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()

    def register(self, model: str, number: int, *, real: bool = False, **behaviour: Any) -> None:
        """Version `number` of a model, which is the next one; it says `v<number>` where its behaviour says no other.

        A `real` one is served by vLLM, and says what it says.
        """
        folder = self._folder / "made" / model / str(number)
        shutil.copytree(self._servable(), folder / "model")
        how = {"default": f"v{number}", "answers": dict.fromkeys(PINNED, "yes"), "of": f"{model} {number}"} | behaviour
        (folder / "model" / "behaviour.json").write_text(json.dumps(how))
        made = Manifest(step="quantize", key="0" * 64, kind="model", files=describe_files(folder), folder=str(folder))

        def log(client: Any) -> dict[str, Any]:
            run = open_step(client, self._runs / "night", "register")
            return log_model(client, made, folder / "upload", run=run, name=model, params={}, tags={})

        tags = lineage_tags({"model": made})
        version = register_version(self._runs, model, made.digest, log, description="", tags=tags)
        assert version.version == str(number), version
        keep_pinned(self._runs, version, _pinned(folder, model, self._said() if real else dict.fromkeys(PINNED, "yes")))

    def corrupt(self, model: str, number: int) -> None:
        """Change a byte of a version's weights where the server keeps them; the size stays."""
        mine = (self._folder / "made" / model / str(number) / "model" / "behaviour.json").read_bytes()
        (kept,) = [path for path in self._kept.rglob("behaviour.json") if path.read_bytes() == mine]
        with kept.with_name("model.safetensors").open("r+b") as file:
            file.seek(-100, os.SEEK_END)
            byte = file.read(1)
            file.seek(-100, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))

    def point(self, model: str, alias: str, number: str) -> None:
        """Set an alias, as a person does; without a number it is removed."""
        if number:
            self._ask(lambda client: client.set_registered_model_alias(model, alias, number))
        else:
            self._ask(lambda client: client.delete_registered_model_alias(model, alias))

    def aliases(self, model: str) -> dict[str, str]:
        """What each alias names."""
        return dict(self._ask(lambda client: client.get_registered_model(model).aliases))

    def decision(self, model: str, number: str) -> str:
        """What the version's tag says of its rollout."""
        tags = self._ask(lambda client: client.get_model_version(model, number).tags)
        return str(tags.get(DECISION_TAG, ""))

    def _servable(self) -> Path:
        """A tiny model that vLLM can serve, made once."""
        folder = self._folder / "servable"
        if not folder.exists():
            from servable import servable_model

            from nvila.components.model.checkpoint.serving import write_serving

            write_serving(*servable_model(), folder)
        return folder

    def _said(self) -> dict[str, str]:
        """What the tiny model says to the pinned prompts, by the library and not by vLLM."""
        import pandas

        from nvila.components.register.served import Answerer

        table = pandas.DataFrame({"question": PINNED})
        return dict(zip(PINNED, Answerer(self._servable()).predict(table, {"max_new_tokens": TOKENS}), strict=True))

    def _ask(self, what: Callable[[Any], Any]) -> Any:
        """The answer; while the server is away it is asked again, as people do."""
        from mlflow.exceptions import MlflowException

        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return what(load_client()(self.url))
            except MlflowException:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


def _pinned(folder: Path, model: str, said: dict[str, str]) -> Path:
    """The file of pinned prompts; what the evaluation said is the truth."""
    bodies = {text: chat_request(model, text, max_tokens=TOKENS) | {"logprobs": True} for text in said}
    lines = [{"id": text, "body": body, "expected": said[text], "answer": said[text]} for text, body in bodies.items()]
    (folder / PINNED_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / PINNED_FILE
