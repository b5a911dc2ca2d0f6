"""`nvila serve` and `nvila stop`: the endpoint by hand. `rollout` starts the same one after its checks."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr

from nvila.components.contracts.errors import ConfigError, PreflightError
from nvila.components.rollout.local import Wanted, start
from nvila.components.serve import endpoint as records
from nvila.components.serve import server
from nvila.components.serve.endpoint import Endpoint
from nvila.components.serve.interpreter import serve_python
from nvila.components.tracking.checkpoints import find_model

DEADLINE_SECONDS = 300.0


def serve(reference: str, host: str, port: int, runs: Path, key: SecretStr | None) -> Endpoint:
    """Start the endpoint of a model, wait until it answers, and return it; nothing to do when it runs already.

    Raises:
        ConfigError: no such model, or one that vLLM does not read.
        DataError: its files are damaged.
        PreflightError: another model is being served, nothing can listen there, or there is no serving environment.
        RolloutError: the server did not come up.
    """
    runs = runs.absolute()
    if not any((ours.host, ours.port) == (host, port) for ours in records.alive(runs)):
        server.require_address(host, port)  # before anything is read or downloaded
    serve_python()
    from nvila.components.model.checkpoint.flat import open_checkpoint
    from nvila.components.model.text.tokenizer import require_files

    model = find_model(reference, runs)
    checkpoint = open_checkpoint(model.folder)
    if checkpoint.layout != "serving":
        raise ConfigError(
            "vLLM reads the layout `serving` only",
            where=str(model.folder),
            do=f"nvila convert {reference} FOLDER --to serving, and serve that; or ask this one with `nvila infer`.",
        )
    require_files(checkpoint.tokenizer)
    wanted = Wanted(model.name, model.version, model.digest, checkpoint.folder, host, port, key)
    with records.exclusive(runs):
        running = records.read(runs)
        if running and running.alive:
            if wanted.served_by(running):
                return running
            raise PreflightError(
                f"{running.model} version {running.version} is being served at {running.url}", do="`nvila stop` first."
            )
        endpoint, _ = start(runs, wanted, port, DEADLINE_SECONDS)
        records.keep(runs, endpoint)
    return endpoint


def stop(runs: Path) -> list[str]:
    """Stop every server of a runs folder and return what was stopped."""
    runs = runs.absolute()
    if not (runs / records.SERVING).is_dir():
        return []
    stopped = []
    with records.exclusive(runs):
        for name in (records.ENDPOINT, records.CHALLENGER):
            running = records.read(runs, name)
            if running and running.alive:
                server.stop(running.pid)
                stopped.append(f"{running.model} version {running.version} at {running.url}")
            records.forget(runs, name)
    return stopped
