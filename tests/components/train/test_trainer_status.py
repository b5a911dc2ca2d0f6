"""What Kubeflow Trainer is told: bodies in the form of its API, and posts that no training waits for."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from nvila.components.contracts.environment import Environment
from nvila.components.train import trainer_status
from nvila.components.train.trainer_status import TrainerStatus, status

NOW = datetime(2026, 11, 28, 1, 2, 3, tzinfo=UTC)
METRICS = {"loss": 1.25, "tokens_per_second": 12345.678, "mfu": 0.41}


class Trainer(HTTPServer):
    """The controller's end: keeps what it was sent, and may refuse it."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, str | None, dict[str, Any]]] = []
        self.answers = 200

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                self.posts.append((handler.path, handler.headers["Authorization"], body))
                handler.send_response(self.answers)
                handler.end_headers()

            def log_message(handler, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    with Trainer() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def here(server: Trainer, token: Path) -> Environment:
    address = f"http://127.0.0.1:{server.server_port}/apis/trainjobs/nvila-train-4/status"
    return Environment(trainer_status_url=address, trainer_status_token=token)


def test_a_body_has_the_form_of_the_api() -> None:
    """A field by another name, or a number where the definition wants a text, is refused by every controller."""
    from kubeflow_trainer_api.models import TrainerV1alpha1UpdateTrainJobStatusRequest as Request

    body = status(0.999, 61.4, METRICS, NOW)
    read = Request.from_dict(body)
    assert read is not None and read.to_dict() == Request.from_json(json.dumps(body)).to_dict()
    told = read.trainer_status
    assert (told.progress_percentage, told.estimated_remaining_seconds, told.last_updated_time) == (99, 61, NOW)
    assert {m.name: m.value for m in told.metrics} == {"loss": "1.25", "tokens_per_second": "12345.7", "mfu": "0.41"}
    assert status(1.0, -0.2, {}, NOW)["trainerStatus"]["progressPercentage"] == 100


def test_a_body_fits_the_definition() -> None:
    """Limits of the definition are of the server that has it; the API's own classes do not know them all."""
    folder = os.environ.get("NVILA_CRDS")
    if not folder:
        pytest.skip("NVILA_CRDS names no folder of custom resource definitions")
    import jsonschema

    definition = yaml.safe_load(Path(folder, "trainer.kubeflow.org_trainjobs.yaml").read_text(encoding="utf-8"))
    (version,) = definition["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]["trainerStatus"]
    schema["additionalProperties"] = schema["properties"]["metrics"]["items"]["additionalProperties"] = False
    for body in (status(0.5, 1e12, METRICS, NOW), status(2, -1, {"a" * 64: 1 / 3}, NOW)):
        jsonschema.validate(body["trainerStatus"], schema)


def test_the_newest_is_posted_with_the_token_of_that_moment(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token read once is refused after an hour; and a stage that ended at 98% looks as if it were still under way."""
    monkeypatch.setattr(trainer_status, "EVERY_SECONDS", 0.0)
    token = tmp_path / "token"
    token.write_text("first\n")
    told = TrainerStatus(here(trainer, token))
    told.tell(0.5, 10, {"loss": 2.0})
    while not trainer.posts:
        threading.Event().wait(0.005)
    token.write_text("second\n")
    told.tell(1.0, 0, {"loss": 1.0})
    told.close()
    seen = [(authorization, body["trainerStatus"]["progressPercentage"]) for _, authorization, body in trainer.posts]
    assert seen[0] == ("Bearer first", 50) and seen[-1] == ("Bearer second", 100)
    assert {path for path, *_ in trainer.posts} == {"/apis/trainjobs/nvila-train-4/status"}


def test_a_refusal_is_said_once_and_stops_nothing(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A feature that is in alpha must not end a week of training, nor fill its log."""
    monkeypatch.setattr(trainer_status, "EVERY_SECONDS", 0.0)
    trainer.answers = 403
    told = TrainerStatus(here(trainer, tmp_path))  # a folder is no token
    told.tell(0.1, 9, {})
    told.close()
    assert not trainer.posts and "IsADirectoryError" in capsys.readouterr().err
    (tmp_path / "token").write_text("t")
    told = TrainerStatus(here(trainer, tmp_path / "token"))
    for share in (0.2, 0.3):
        before = len(trainer.posts)
        told.tell(share, 9, {})
        while len(trainer.posts) == before:
            threading.Event().wait(0.005)
    told.close()
    assert capsys.readouterr().err.count("Kubeflow Trainer is not told of the progress: HTTPError") == 1
