"""Where MLflow keeps things and how we reach it: late import, no telemetry, one writer at a time, a bounded wait for a
store that is away, errors of ours.

The first use of a new sqlite store creates its tables (2.6 s; later about 1 s a process, half of it import).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvila.components.contracts.addresses import file_url, sqlite_url
from nvila.components.contracts.environment import before_importing, current, name_of
from nvila.components.contracts.errors import ConfigError, NvilaError, Unreachable
from nvila.components.contracts.locks import alone, lacking
from nvila.components.contracts.places import standing
from nvila.components.contracts.surroundings import own_folder
from nvila.components.contracts.text import say
from nvila.components.tracking.redact import redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "nvila"
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""Without it the UI takes the experiment for one of prompts and opens on a page that stays empty."""
PATIENCE_SECONDS = 10.0
"""How long is waited for a store that does not answer, where the work can do without it, or a person waits."""
NEEDED_SECONDS = 45.0
"""The same of a step that cannot do without: a server that is started again takes half a minute."""
_ASK_SECONDS = 5
_UPLOAD_SECONDS = 600
_PLACE = 200 - len("/artifacts/") - 32
"""Characters that the column of a run's artifacts leaves for those of its experiment."""
_NOT_ALLOWED = (401, 403)
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_NO_ENTRY = ("authentication failed", "no password", "pg_hba.conf", "does not exist", "denied", "Unknown database")
"""What databases say that are there and do not let us in."""


def tracking_uri(runs: Path) -> str:
    """`MLFLOW_TRACKING_URI`, else a sqlite file in the runs folder (no server is needed).

    On a file system without locks the file has none; `connected` lets one process at a time to it.
    """
    return current().mlflow_tracking_uri or sqlite_url(runs / "mlflow.db", locks=not lacking(standing(runs)))


def has_store(runs: Path) -> bool:
    """Whether there is anything to read: connecting to the local default would make an empty one."""
    return current().mlflow_tracking_uri is not None or (runs / "mlflow.db").is_file()


def is_shared() -> bool:
    """Whether others, with folders of runs of their own, may use the registry too."""
    return bool(current().mlflow_tracking_uri or current().mlflow_registry_uri)


def load_client() -> type[MlflowClient]:
    """Import MLflow (two seconds), without telemetry and chatter, and with requests that end soon."""
    before_importing("mlflow")
    from mlflow import MlflowClient

    return MlflowClient


@contextmanager
def connected(runs: Path, patience_seconds: float | None = None) -> Iterator[MlflowClient]:
    """A client on the tracking store and registry of a runs folder, which no other process of ours uses meanwhile.

    MLflow itself waits up to 20 s for sqlite; the lock also covers the making of the tables, which it does not guard.
    Who waits for a server keeps nobody from the local store.

    Args:
        runs: the runs folder.
        patience_seconds: how long to wait for a store that does not answer; `PATIENCE_SECONDS` by default.

    Raises:
        Unreachable: it does not answer.
        ConfigError: there is no MLflow that can be used, or it does not let us in.
        NvilaError: it does not take what it is given.
    """
    uri = tracking_uri(runs)
    wait_for(runs, PATIENCE_SECONDS if patience_seconds is None else patience_seconds)
    runs.mkdir(parents=True, exist_ok=True)
    with alone(_lock(uri, runs), f"MLflow at {redact_text(uri)}: another process writes to it"):
        client = _client(uri, runs)
        with answered(uri):
            yield client


def _lock(uri: str, runs: Path) -> Path:
    """Of the store, whichever folders of runs use it: beside a database file; of a server, for this user's processes
    on this machine."""
    if current().mlflow_tracking_uri is None:
        return runs / ".mlflow.lock"
    from sqlalchemy import make_url

    database = make_url(uri).database if _is_local(uri) else None
    if not database or database.startswith("file:"):
        return own_folder("locks") / f"mlflow-{sha256(uri.encode()).hexdigest()}.lock"
    return Path(database).with_name(f".{Path(database).stem}.lock")


def wait_for(runs: Path, patience_seconds: float) -> None:
    """Return when the tracking store and the registry answer; that they do not is said once, with the bound.

    Raises:
        Unreachable: one of them does not within the patience.
        ConfigError: one of them is none, or lets nobody in.
    """
    load_client()
    deadline, told = time.monotonic() + patience_seconds, False
    for uri in dict.fromkeys(filter(None, [tracking_uri(runs), current().mlflow_registry_uri])):
        while True:
            try:
                _ask(uri)
                break
            except Unreachable as away:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
                if not told:
                    say(f"{away.where}: {away.what}; waiting for it, {patience_seconds:.0f} s at most")
                told = True
                time.sleep(min(1.0, left))


def check(runs: Path) -> None:
    """Have MLflow show that it can do what a run will ask of it; nothing is written there.

    Raises:
        Unreachable, ConfigError, NvilaError: as `connected`.
    """
    uri = tracking_uri(runs)
    with connected(runs) as client:
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
    place = _artifacts(runs)
    if place and not _is_local(uri) and len(place) > _PLACE:
        raise ConfigError(
            f"the folder of runs has too long a path for MLflow's database ({_PLACE} characters as a URL)",
            where=str(runs),
            value=len(place),
            do="Choose a shorter one.",
        )


def _ask(uri: str) -> None:
    """One short question, whatever the answer is; none to a store that has nothing to be away.

    Raises:
        Unreachable: no answer.
        ConfigError: as `connected`.
    """
    scheme = uri.partition(":")[0]
    if scheme == "file" or (":" not in uri and not uri.startswith("databricks")):
        raise ConfigError(
            "a folder cannot be the tracking store, as MLflow keeps its registry in a database",
            where=redact_text(uri),
            do=f"Set {name_of('mlflow_tracking_uri')} to the URL of a database or of a server, or to nothing: "
            "then it is mlflow.db in the folder of runs.",
        )
    if scheme in ("http", "https"):
        from mlflow.tracking._tracking_service.utils import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        with answered(uri):
            asked = {"max_retries": 0, "timeout": _ASK_SECONDS, "raise_on_status": False}
            status = http_request(get_default_host_creds(uri), "/health", "GET", **asked).status_code
        if status >= 500 or status == 429:
            raise _away(uri, f"status {status}")
    elif _is_database(uri) and not _is_local(uri):
        _ask_database(uri)


def _ask_database(uri: str) -> None:
    """MLflow itself tries a database that is away for 100 seconds, in silence."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import OperationalError, SQLAlchemyError
    from sqlalchemy.pool import NullPool

    bounded = {} if uri.startswith("mssql") else {"connect_timeout": _ASK_SECONDS}
    try:
        create_engine(uri, poolclass=NullPool, connect_args=bounded).connect().close()
    except OperationalError as error:
        if not any(said in str(error) for said in _NO_ENTRY):
            raise _away(uri, _said(error)) from error
        raise _unusable(uri, error) from error
    except (SQLAlchemyError, ValueError, ImportError) as error:
        raise _unusable(uri, error) from error


def _client(uri: str, runs: Path) -> MlflowClient:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # MLflow writes the place of its first experiment, by default in the working directory, into SQL as it is: quotes,
    # colons and backslashes in it end that. In a URL there are none.
    before_importing("mlflow", {"_MLFLOW_SERVER_ARTIFACT_ROOT": file_url(runs / "mlartifacts")})
    try:
        return load_client()(uri, registry_uri=current().mlflow_registry_uri or uri)
    except (MlflowException, SQLAlchemyError, ValueError, ImportError) as error:
        raise _unusable(uri, error) from error


@contextmanager
def answered(uri: str) -> Iterator[None]:
    """What comes of a server that is away, is none of MLflow's, lets nobody in, or refuses, as errors of ours.

    Raises:
        Unreachable, ConfigError, NvilaError: as `connected`.
    """
    from mlflow.exceptions import InvalidUrlException, MlflowException, RestException

    try:
        yield
    except MlflowException as error:
        status, text = error.get_http_status_code(), str(error)
        # Of a failed request MLflow names the address first; then there was no answer that it understands.
        unheard = not isinstance(error, RestException) and text.startswith("API request to ")
        wrong = isinstance(error, InvalidUrlException) or (
            unheard and (status < 500 or " was successful but " in text or "CERTIFICATE_VERIFY_FAILED" in text)
        )
        if wrong or status in _NOT_ALLOWED:
            raise ConfigError(
                f"MLflow does not do as asked: {_said(error)}",
                where=redact_text(uri),
                do=f"Look at {name_of('mlflow_tracking_uri')} and the credentials for it.",
            ) from error
        if unheard or status in (429, 503) or (status >= 500 and isinstance(error, RestException)):
            raise _away(uri, _said(error)) from error
        raise NvilaError(
            f"MLflow does not take this: {_said(error)}",
            where=redact_text(uri),
            do="Nothing is lost: the same command goes on from here.",
        ) from error


@contextmanager
def uploading(what: str, where: str, do: str) -> Iterator[None]:
    """Time for an upload: a server answers when it has passed the whole file on to its own store.

    Raises:
        NvilaError: the place of artifacts, which may be another's than MLflow's, does not take it; `what`, `where` and
            `do` are for the message.
    """
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT
    from mlflow.exceptions import MlflowException

    before = TIMEOUT.get()
    TIMEOUT.set(max(before, _UPLOAD_SECONDS))
    try:
        yield
    except (MlflowException, NvilaError):
        raise
    except Exception as error:
        said = f"{what} could not be uploaded: {type(error).__name__}: {redact_text(str(error))}"
        raise NvilaError(said, where=redact_text(where), do=do) from error
    finally:
        TIMEOUT.set(before)


def pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """Everything that a search of MLflow finds, page after page."""
    page = None
    while True:
        some = search(*arguments, page_token=page, **options)
        yield from some
        page = some.token
        if not page:
            return


def experiment_id(client: MlflowClient, runs: Path) -> str:
    """The experiment `nvila`, made when missing, brought back when somebody has deleted it."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            return client.create_experiment(EXPERIMENT, _artifacts(runs), tags={KIND_TAG: KIND})
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return experiment_id(client, runs)  # another machine was quicker
    if found.lifecycle_stage == "deleted":  # it keeps its name until `mlflow gc`, and takes no runs
        client.restore_experiment(found.experiment_id)
        say(f"MLflow's experiment {EXPERIMENT} was deleted; it is restored, to record runs in")
    if KIND_TAG not in found.tags:
        client.set_experiment_tag(found.experiment_id, KIND_TAG, KIND)
    return str(found.experiment_id)


def _artifacts(runs: Path) -> str | None:
    """Of a database that no server stands before, the runs folder: MLflow would take that of the process."""
    return file_url(runs / "mlartifacts") if _is_database(tracking_uri(runs)) else None


def _away(uri: str, said: str) -> Unreachable:
    return Unreachable(
        f"MLflow does not answer: {said}",
        where=redact_text(uri),
        do="Nothing is lost: run the same command again when it is back.",
    )


def _unusable(uri: str, error: Exception) -> ConfigError:
    driver = isinstance(error, ImportError) and uri.startswith("postgres")
    return ConfigError(
        f"MLflow cannot use this: {_said(error)}",
        where=redact_text(uri),
        do="Write postgresql+psycopg2://, whose driver is installed."
        if driver
        else f"See to it, or set {name_of('mlflow_tracking_uri')} to another.",
    )


def _said(error: Exception, limit: int = 300) -> str:
    """The error's first line, or what it says was its cause; servers answer with whole pages."""
    first = redact_text(str(error)).strip().partition("\n")[0]
    if "(Caused by " in first:  # NewConnectionError("HTTPConnection(...): why"))
        first = first.rpartition("(Caused by ")[2].rpartition("): ")[2].rstrip("\"')")
    return (first if len(first) <= limit else first[:limit] + "...").rstrip(".")


def _is_local(uri: str) -> bool:
    return uri.startswith("sqlite:")


def _is_database(uri: str) -> bool:
    return uri.partition(":")[0].partition("+")[0] in _DATABASES
