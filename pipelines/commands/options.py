"""Arguments and options that several commands of `nvila` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nvila.components.contracts.environment import name_of
from nvila.components.contracts.places import local_folder


def local(context: typer.Context, option: typer.CallbackParam, given: Any) -> Any:
    """Refuse the address of an object store where a path is meant: it would become a folder `s3:` here."""
    name = option.opts[0] if option.param_type_name == "option" else (option.name or "").upper()
    for value in given if isinstance(given, list | tuple) else [given] if given else []:
        local_folder(value, name)
    return given


Runs = Annotated[
    Path,
    typer.Option("--runs", callback=local, help="Folder of the runs, the MLflow store and the endpoint's state."),
]
Model = Annotated[
    str,
    typer.Argument(
        help="A folder or manifest.json, s3://bucket/prefix, hf://id@revision, NAME@ALIAS, NAME/NUMBER, or an alias "
        "(champion) or number of the newest registered model."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object; where it failed, with an `error` in it.")]
Store = Annotated[Path, typer.Option("--store", callback=local, help="Folder of finished work, shared between runs.")]
Override = Annotated[
    list[str] | None, typer.Option("--override", "-o", help="dotted.key=value laid over the recipe; repeatable.")
]
Host = Annotated[
    str,
    typer.Option("--host", envvar=name_of("pipelines_endpoint"), help="URL of Kubeflow Pipelines.", show_default=False),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file", callback=local, help="File with the bearer token; else KF_PIPELINES_TOKEN in the environment."
    ),
]
CaCert = Annotated[
    Path | None,
    typer.Option("--ca-cert", callback=local, help="PEM file to check the server's certificate with."),
]
