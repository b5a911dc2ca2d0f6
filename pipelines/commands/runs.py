"""`nvila status RUN` and `nvila logs RUN STEP`: of a run on this machine by its folder, on Kubeflow by its id."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from nvila.components.contracts.environment import name_of
from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.text import visible_lines
from nvila.components.tracking.redact import redact_text, tell
from nvila.pipelines.commands.options import CaCert, Host, Json, Runs, TokenFile
from nvila.pipelines.show.as_json import put

if TYPE_CHECKING:
    from nvila.pipelines.show.standing import Source

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Name below --runs (`latest` is one) or folder of a run of this machine, or id of one on Kubeflow.",
        show_default=False,
    ),
]


def status(
    context: typer.Context,
    run: Run = "",
    wait: Annotated[bool, typer.Option("--wait", help="Show the steps of RUN until it ends.")] = False,
    host: Host = "",
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    as_json_: Json = False,
    runs: Runs = Path("runs"),
) -> None:
    """Tell what is served here; with RUN how that run stands: its steps, how it ended, at which of them, and why.

    Without RUN: address, versions, health, restarts, and what the last rollout decided. Exit code: 0 where users are
    answered, 1 where they are not.

    With RUN: 0 going on or done, else that of the run: 2 wrong input, 3 rejected by a gate, 75 stopped or cancelled, 1
    a fault. Also 2 where Kubeflow is away, lets nobody in, or has no such run.

    Example: nvila status latest
    """
    if not run:
        _served(context, as_json_, runs)
    from rich.console import Console

    from nvila.pipelines.show.standing import as_json, show

    console = Console(stderr=as_json_)
    found = _found(context, run, runs, host, token_file, ca_cert)
    now = found.wait(console) if wait else found.look()
    if as_json_:
        put(as_json(now))
    else:
        show(now, console)
    raise typer.Exit(int(now.exit_code))


def logs(
    context: typer.Context,
    run: Run,
    step: Annotated[str, typer.Argument(metavar="STEP", help="Name of a step, such as train-4.", show_default=False)],
    host: Host = "",
    token_file: TokenFile = None,
    ca_cert: CaCert = None,
    runs: Runs = Path("runs"),
) -> None:
    """Print what a step of a run has printed, in its newest try.

    On Kubeflow a step's log is there once its pod has ended, as Argo archives it then. Exit code: 0, or 2 where there
    is no such run, step or log, or Kubeflow is away or lets nobody in.

    Example: nvila logs latest train-4
    """
    text = redact_text(_found(context, run, runs, host, token_file, ca_cert).log(step))
    typer.echo(visible_lines(text) if sys.stdout.isatty() else text, nl=not text.endswith("\n"))


def _found(
    context: typer.Context, run: str, runs: Path, host: str, token_file: Path | None, ca_cert: Path | None
) -> Source:
    """The run of this machine, or the one of Kubeflow: where --host is given, else where it is not here.

    Raises:
        ConfigError: it is not here, and no server is named; or the server's options go with a run of this machine.
    """
    from nvila.pipelines.kubeflow.connection import Connection
    from nvila.pipelines.kubeflow.run import KubeflowRun
    from nvila.pipelines.kubeflow.server import Server
    from nvila.pipelines.local.standing import LocalRun

    here = None if _is_given(context, "host") else LocalRun.find(run, runs)
    if here and (token_file or ca_cert):
        raise ConfigError("this run is on this machine", where="--token-file and --ca-cert", do="Leave them out.")
    if here:
        return here
    if not host:
        raise ConfigError(
            "no such run on this machine, and no Kubeflow is named",
            where="RUN",
            value=run,
            do=f"Name its folder (or --runs); or --host or {name_of('pipelines_endpoint')} for a run on Kubeflow.",
        )
    return KubeflowRun(Server(Connection(host, context.obj, token_file=token_file, ca_cert=ca_cert)), run)


def _served(context: typer.Context, for_programs: bool, runs: Path) -> NoReturn:
    """Tell of the endpoint.

    Raises:
        ConfigError: an option that goes with a run.
    """
    given = {"host": "--host", "token_file": "--token-file", "ca_cert": "--ca-cert", "wait": "--wait"}
    for name, option in given.items():
        if _is_given(context, name):
            raise ConfigError("goes with a run", where=option, do="Name the run, or leave it out.")
    from nvila.pipelines.commands.endpoint import lines, look

    told = look(runs)
    if for_programs:
        put(told)
    else:
        for line in lines(told):
            typer.echo(tell(line))
    raise typer.Exit(Exit.DONE if told["serving"] else Exit.FAULT)


def _is_given(context: typer.Context, option: str) -> bool:
    """Whether it stands on the command line, and not in the environment only."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"
