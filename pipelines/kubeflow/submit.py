"""`nvila submit`: checks a recipe, uploads the pipeline where asked, and starts a run on a cluster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import yaml
from rich.console import Console

from nvila.components.contracts.errors import ConfigError
from nvila.components.contracts.exits import Exit
from nvila.components.contracts.pipelines import PipelineName
from nvila.components.contracts.recipe.form import given
from nvila.components.contracts.recipe.reader import shipped
from nvila.components.contracts.recipe.recipe import slices
from nvila.components.contracts.recipe.rollout import TARGETS
from nvila.components.tracking.redact import tell
from nvila.pipelines.commands.overrides import asked_for
from nvila.pipelines.kubeflow.connection import Conflict
from nvila.pipelines.kubeflow.run import KubeflowRun
from nvila.pipelines.kubeflow.server import Server
from nvila.pipelines.show.watch import print_line

if TYPE_CHECKING:
    from kfp_server_api import V2beta1PipelineVersion


@dataclass(frozen=True)
class Version:
    """Which compiled pipeline a run takes."""

    image: str = ""
    """Image of the steps; empty takes the newest version that is installed on the cluster."""
    quantize_image: str = ""

    @property
    def own(self) -> bool:
        """Whether it is compiled here."""
        return bool(self.image or self.quantize_image)


@dataclass(frozen=True)
class Wanted:
    """How the run is called and where it runs."""

    namespace: str | None = None
    experiment: str = "nvila"
    run_name: str | None = None
    service_account: str | None = None


def upload(
    server: Server, version: Version, namespace: str | None, console: Console, pipeline: PipelineName = "lifecycle"
) -> V2beta1PipelineVersion:
    """Make sure that the pipeline compiled here is on the server, and return its version there.

    The version's name is the digest of its content, so the same content is never uploaded twice.

    Raises:
        ConfigError: no image, or a name that is taken.
    """
    from nvila.pipelines.compile.package import compiled, resource_name, version_name

    if not (version.image and version.quantize_image):
        raise ConfigError("an upload needs the images of the steps", where="--image and --quantize-image")
    spec, platform = compiled(version.image, version.quantize_image, pipeline)
    called, name, about = resource_name(pipeline), version_name(spec, platform), spec["pipelineInfo"]["description"]
    there = server.pipeline(called, [namespace])
    if there is None:
        try:
            there = server.create_pipeline(called, spec["pipelineInfo"]["displayName"], about, namespace)
        except Conflict as error:
            there = server.pipeline(called, [namespace])
            if there is None:
                raise ConfigError(
                    f"a pipeline {called} is there, but not yours to see: {error}", where="--namespace", value=namespace
                ) from None
    if found := _version(server, there.pipeline_id, name):
        print_line(console, f"{called}: version {name} is there already")
        return found
    with TemporaryDirectory() as folder:
        file = Path(folder, f"{name}.yaml")
        file.write_text(yaml.safe_dump_all([spec, platform]), encoding="utf-8")
        try:
            made = server.upload_version(there.pipeline_id, name, f"image {version.image}", file)
        except Conflict:  # the same upload from elsewhere was faster
            made = _version(server, there.pipeline_id, name)
            if made is None:
                raise
    print_line(console, f"{called}: version {name} uploaded")
    return made


def submit(
    recipe: str,
    overrides: Iterable[str],
    server: Server,
    version: Version,
    wanted: Wanted,
    console: Console,
    *,
    data_uri: str = "",
    model_name: str = "",
    start_from: str = "",
    target: str = "",
    wait: bool = False,
) -> int:
    """Start a run and return the exit code: 0 once it is started, or with `wait` that of the run (see `Exit`).

    Raises:
        ConfigError: recipe, options, token or namespace are wrong; nothing has been started.
        ServerDown: the server is away.
    """
    import kfp_server_api as api

    if not recipe:
        raise ConfigError("which recipe?", where="RECIPE", do=f"Shipped are: {', '.join(shipped())}.")
    fields = {"data_uri": data_uri, "model_name": model_name, "start_from": start_from, "target": target}
    form, checked = asked_for(recipe, overrides, here=False, **fields)
    if not target and TARGETS[checked.rollout.target].serves_here:
        form, checked = asked_for(recipe, overrides, here=False, **fields | {"target": "none"})
    if TARGETS[checked.rollout.target].serves_here:
        able = ", ".join(name for name, one in TARGETS.items() if not one.serves_here)
        raise ConfigError(
            "no pod can serve so", where="rollout.target", value=checked.rollout.target, do=f"Take one of {able}."
        )
    slices(checked)  # refuses what resolve would
    namespace = namespace_of(server, wanted.namespace)
    pipeline = checked.pipeline
    if version.own:
        chosen = upload(server, version, namespace, console, pipeline.name)
    else:
        chosen = _installed(server, pipeline.name, namespace)
    experiment = server.experiment(wanted.experiment, namespace)
    started = server.create_run(
        api.V2beta1Run(
            display_name=wanted.run_name or f"{checked.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
            experiment_id=experiment.experiment_id,
            pipeline_version_reference=api.V2beta1PipelineVersionReference(
                pipeline_id=chosen.pipeline_id, pipeline_version_id=chosen.pipeline_version_id
            ),
            runtime_config=api.V2beta1RuntimeConfig(parameters=given(form, pipeline)),
            service_account=wanted.service_account,
        )
    )
    where = server.run_url(started.run_id)
    print_line(console, tell(f"run {started.display_name}: {where}"))
    if not wait:
        return int(Exit.DONE)
    now = KubeflowRun(server, started.run_id).wait(console)
    print_line(console, tell(f"run {now.run}: {now.line}"))
    return int(now.exit_code)


def namespace_of(server: Server, given: str | None, *, shared: bool = False) -> str | None:
    """The namespace to work in; None where the server knows no users, or for what may be `shared` by all of them.

    Raises:
        ConfigError: one is needed, or there are none.
    """
    several = server.multi_user()
    if several and not given and not shared:
        raise ConfigError("this server has a namespace for every user", where="--namespace", do="Name yours.")
    if given and not several:
        raise ConfigError("this server has no namespaces of users", where="--namespace", value=given, do="Leave it out")
    return given


def _installed(server: Server, name: PipelineName, namespace: str | None) -> V2beta1PipelineVersion:
    """The newest version that is on the server, of the namespace's own pipeline or else of the shared one."""
    from nvila.pipelines.compile.package import resource_name

    pipeline = server.pipeline(called := resource_name(name), [namespace, None] if namespace else [None])
    newest = next(server.versions(pipeline.pipeline_id), None) if pipeline else None
    if newest is None:
        raise ConfigError(
            f"no pipeline {called} is installed there",
            where=server.host,
            do="Install the chart, or give --image to upload the pipeline from here.",
        )
    return newest


def _version(server: Server, pipeline_id: str, name: str) -> V2beta1PipelineVersion | None:
    return next((v for v in server.versions(pipeline_id) if name in (v.name, v.display_name)), None)
