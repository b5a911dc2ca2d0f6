"""Asks MLflow, the S3 store and Kubeflow Pipelines, as a pod of the cluster is configured to: the hook of `helm test`.

    python -m nvila.infra.checks.services [--mlflow] [--write s3://bucket/prefix] [--pipelines URL]

A line for each says that it answers, or what is in the way. Exit code 0, or that of the first error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nvila.components.contracts.environment import Environment, entered
from nvila.components.contracts.errors import ConfigError, DataError, NvilaError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.text import say

TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
"""Where the chart's pods have their token for Kubeflow Pipelines."""
_OBJECT = ".nvila-test"


def mlflow() -> str:
    """MLflow does what a run will ask of it.

    Raises:
        NvilaError: as `tracking.connect.check`.
    """
    from nvila.components.tracking.connect import check, tracking_uri

    runs = Path("/tmp/runs")  # the local store, which a server has no use for
    check(runs)
    return tracking_uri(runs)


def store(place: str) -> str:
    """A small object can be written there, read back and removed.

    Raises:
        ConfigError: no `s3://bucket/prefix`.
        DataError: the store refuses, or does not answer.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    from nvila.components.data.remote.s3client import connect

    bucket, _, prefix = place.removeprefix("s3://").strip("/").partition("/")
    if not place.startswith("s3://") or not prefix:
        raise ConfigError("not s3://bucket/prefix", where="--write", value=place)
    client, named = connect(), {"Bucket": bucket, "Key": f"{prefix}/{_OBJECT}"}
    try:
        client.put_object(**named, Body=b"nvila")
        if client.get_object(**named)["Body"].read() != b"nvila":
            raise DataError("another object came back than was written", where=place)
        client.delete_object(**named)
    except (BotoCoreError, ClientError) as error:
        raise DataError(
            f"the store does not do as asked: {error}",
            where=place,
            do="Look at s3.endpoint, s3.bucket and s3.region, and the keys of the Secret nvila-credentials: they need "
            "s3:PutObject, s3:GetObject and s3:DeleteObject there.",
        ) from error
    return place


def pipelines(host: str, here: Environment) -> str:
    """Kubeflow Pipelines answers as its API does.

    Raises:
        NvilaError: as `Connection` and its `call`.
    """
    from nvila.pipelines.kubeflow.connection import Connection
    from nvila.pipelines.kubeflow.server import Server

    several = Server(Connection(host, here, token_file=TOKEN if TOKEN.is_file() else None)).multi_user()
    return f"{host} ({'multi-user' if several else 'single-user'})"


def main(words: Sequence[str] | None = None) -> int:
    """The program; each service is asked, whatever the others said."""
    parser = argparse.ArgumentParser(prog="nvila-test", description=__doc__)
    parser.add_argument("--mlflow", action="store_true")
    parser.add_argument("--write", metavar="S3URI")
    parser.add_argument("--pipelines", metavar="URL")
    given = parser.parse_args(words)
    with entered(here := Environment.read()):
        return max((_told(name, ask) for name, ask in _asked(given, here)), default=Exit.DONE, key=bool)


def _asked(given: argparse.Namespace, here: Environment) -> Iterator[tuple[str, Callable[[], str]]]:
    if given.mlflow:
        yield "MLflow", mlflow
    if given.write:
        yield "S3", lambda: store(given.write)
    if given.pipelines:
        yield "Kubeflow Pipelines", lambda: pipelines(given.pipelines, here)


def _told(name: str, ask: Callable[[], str]) -> int:
    try:
        say(f"[ok] {name}: {ask()}")
    except NvilaError as error:
        say(f"[failed] {name}: {' '.join(str(error).split())}")
        return error.exit_code
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
