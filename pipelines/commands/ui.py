"""`nvila ui`: MLflow's own pages on the local store of a folder of runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from nvila.components.contracts.environment import before_importing, current, name_of
from nvila.components.contracts.errors import ConfigError
from nvila.components.tracking.connect import has_store, tracking_uri
from nvila.components.tracking.redact import redact_text


def serve(runs: Path, port: int) -> NoReturn:
    """Become MLflow's server of this folder.

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
    before_importing("mlflow")
    options = ["--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", tracking_uri(runs)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *options])
