"""Where MLflow keeps things and how we reach it: late import, no telemetry, one writer at a time, errors of ours.

The first use of a new sqlite store creates its tables (2.6 s; later about 1 s a process, half of it import).
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nvila.components.contracts.addresses import file_url, sqlite_url
from nvila.components.contracts.environment import before_importing, current, name_of
from nvila.components.contracts.errors import ConfigError, Unreachable
from nvila.components.tracking.redact import redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "nvila"
_RETRIES, _ANSWER_SECONDS = 4, 20
"""Of a request that a person waits for: five tries, as for S3 and the hub. MLflow's own take four minutes and more."""
_NOT_ALLOWED = (401, 403)


def tracking_uri(runs: Path) -> str:
    """`MLFLOW_TRACKING_URI`, else a sqlite file in the runs folder (no server is needed)."""
    return current().mlflow_tracking_uri or sqlite_url(runs / "mlflow.db")


def has_store(runs: Path) -> bool:
    """Whether there is anything to read: connecting to the local default would make an empty one."""
    return current().mlflow_tracking_uri is not None or (runs / "mlflow.db").is_file()


def load_client() -> type[MlflowClient]:
    """Import MLflow (two seconds), without telemetry and chatter."""
    before_importing("mlflow")
    from mlflow import MlflowClient

    return MlflowClient


def hurry() -> None:
    """Have the requests of this process give up soon, for a command whose user waits; what the user has set stays."""
    load_client()
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as RETRIES
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT

    for variable, value in ((RETRIES, _RETRIES), (TIMEOUT, _ANSWER_SECONDS)):
        if not variable.is_set():
            variable.set(value)


@contextmanager
def connected(runs: Path) -> Iterator[MlflowClient]:
    """A client on the tracking store and registry of a runs folder, which no other process of ours uses meanwhile.

    MLflow itself waits up to 20 s for sqlite; the lock also covers the making of the tables, which it does not guard.
    Who waits for a server keeps nobody from the local store.

    Raises:
        Unreachable: the server does not answer.
        ConfigError: there is no MLflow that can be used, or it does not let us in.
    """
    uri = tracking_uri(runs)
    load_client()
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / (".mlflow.lock" if _is_local(uri) else ".mlflow-server.lock")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        client = _client(uri)
        with answered(uri):
            yield client


def _client(uri: str) -> MlflowClient:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    try:
        return load_client()(uri, registry_uri=current().mlflow_registry_uri or uri)
    except (MlflowException, SQLAlchemyError, ValueError, ImportError) as error:
        if isinstance(error, OperationalError) and not _is_local(uri):
            raise _away(uri, error) from error
        raise ConfigError(
            f"MLflow cannot use this: {_said(error)}",
            where=redact_text(uri),
            do=f"See to it, or set {name_of('mlflow_tracking_uri')} to another.",
        ) from error


@contextmanager
def answered(uri: str) -> Iterator[None]:
    """What comes of a server that is away, is none of MLflow's, or lets nobody in, as errors of ours.

    Raises:
        Unreachable, ConfigError: as `connected`.
    """
    from mlflow.exceptions import MlflowException, RestException

    try:
        yield
    except MlflowException as error:
        text, status, told = str(error), error.get_http_status_code(), isinstance(error, RestException)
        if not told and not text.startswith("API request to "):  # the way in which each failed request is named
            raise
        if status in _NOT_ALLOWED or (not told and (status < 500 or " was successful but " in text)):
            raise ConfigError(
                f"MLflow does not do as asked: {_said(error)}",
                where=redact_text(uri),
                do=f"Look at {name_of('mlflow_tracking_uri')} and the credentials for it.",
            ) from error
        if status >= 500 or status == 429:
            raise _away(uri, error) from error
        raise


def _away(uri: str, error: Exception) -> Unreachable:
    return Unreachable(
        f"MLflow does not answer: {_said(error)}",
        where=redact_text(uri),
        do="Nothing is lost: run the same command again when it is back.",
    )


def _said(error: Exception, limit: int = 300) -> str:
    """The error's first line, or what it says was its cause; servers answer with whole pages."""
    first = redact_text(str(error)).strip().partition("\n")[0].rpartition("(Caused by ")[2]
    return (first if len(first) <= limit else first[:limit] + "...").rstrip(".")


def _is_local(uri: str) -> bool:
    return uri.startswith("sqlite:")


def experiment_id(client: MlflowClient, runs: Path) -> str:
    """The experiment `nvila`, made when missing. On sqlite its artifacts lie in the runs folder."""
    if found := client.get_experiment_by_name(EXPERIMENT):
        return found.experiment_id
    local = _is_local(tracking_uri(runs))
    return client.create_experiment(EXPERIMENT, artifact_location=file_url(runs / "mlartifacts") if local else None)
