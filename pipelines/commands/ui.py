"""`nvila ui`: MLflow's own pages on the local store of a folder of runs."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from nvila.components.contracts.children import STOPS, leashed
from nvila.components.contracts.environment import before_importing, current, name_of
from nvila.components.contracts.errors import ConfigError
from nvila.components.tracking.connect import has_store, tracking_uri
from nvila.components.tracking.redact import redact_text


def serve(runs: Path, port: int) -> int:
    """Run MLflow's server of this folder until it ends, or until this process is told to; the exit code.

    Raises:
        ConfigError: no run has been tracked in the folder, or runs are tracked by a server elsewhere.
    """
    if elsewhere := current().mlflow_tracking_uri:
        raise ConfigError(
            f"runs are tracked at {redact_text(elsewhere)}",
            where=name_of("mlflow_tracking_uri"),
            do="Open that, or unset the variable for the runs of a folder.",
        )
    if not has_store(runs):
        raise ConfigError("no run has been tracked here", where=str(runs), do="Name the folder of runs with `--runs`.")
    # Without jobs and further workers, a dozen processes that nothing here uses.
    before_importing("mlflow", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", tracking_uri(runs)]
    server, told = leashed([sys.executable, "-m", "mlflow", "ui", *options]), list[int]()

    def stop(number: int, frame: object) -> None:
        told.append(number)
        server.terminate()

    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    code = server.wait()
    return 0 if told else code
