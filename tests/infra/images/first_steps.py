"""The first steps of the micro recipe as a pipeline of their own, in processes and in containers.

KFP's DockerRunner lets Docker remove a container that has ended, and takes one that is gone for a success.
`InContainers` stands in its place: it runs the same commands with podman and keeps each container until its exit status
has been read.
"""

import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from kfp import dsl, local
from kfp.local import docker_task_handler
from kfp.local.status import Status
from kfp.local.task_handler_interface import ITaskHandler

from nvila.components.contracts.environment import named
from nvila.components.contracts.errors import PreflightError
from nvila.components.contracts.manifest import Manifest
from nvila.components.initialize.component import initialize
from nvila.components.preflight.component import preflight
from nvila.components.resolve.component import resolve
from nvila.components.train.component import train
from nvila.components.validate.component import validate
from nvila.infra.images.build import SCRATCH, revision
from nvila.infra.images.machine import podman_environment

IMAGE = os.environ.get("NVILA_IMAGE", "localhost/nvila/base:dev")
STEPS = ("resolve", "preflight", "validate", "initialize", "train-1")
USER = "65532:65532"


def podman(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run podman and wait for it."""
    return subprocess.run(["podman", *arguments], env=podman_environment(SCRATCH), text=True, **options)


def why_not(image: str = IMAGE) -> str | None:
    """Why containers of this image cannot be run here, or None."""
    try:
        label = '{{index .Labels "org.opencontainers.image.revision"}}'
        found = podman("image", "inspect", "--format", label, image, capture_output=True)
    except PreflightError as error:
        return str(error)
    if found.returncode:
        return f"no image {image}: make images"
    return None if found.stdout.strip() == revision() else f"{image} is of another commit: make images"


def contain(image: str, command: list[str], folder: Path, variables: Mapping[str, str]) -> tuple[int, str]:
    """Exit status and output of a command in a container as a cluster would run it.

    The root file system is read-only, the user has no account and no privileges, there is no network; `folder` is
    mounted at its own path and is the working directory.
    """
    name = f"nvila-{uuid.uuid4().hex[:12]}"
    options = ["--name", name, "--user", USER, "--read-only", "--tmpfs", "/tmp:rw,mode=1777", "--network", "none"]
    # vLLM shares 160 MiB between its processes; containers have 64 unless told.
    options += ["--shm-size", "1g"]
    options += ["--cap-drop", "all", "--security-opt", "no-new-privileges", "--pull", "never"]
    options += ["--volume", f"{folder}:{folder}", "--workdir", str(folder)]
    options += [part for key, value in variables.items() for part in ("--env", f"{key}={value}")]
    try:
        ran = podman("run", *options, image, *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        state = podman("inspect", "--format", "{{.State.ExitCode}}", name, capture_output=True, check=True)
        assert int(state.stdout) == ran.returncode, ran.stdout
        return ran.returncode, ran.stdout
    finally:
        podman("rm", "--force", name, capture_output=True)


class InContainers(ITaskHandler):
    """Runs KFP's local tasks with `contain`; the working directory is mounted."""

    codes: list[int] = []
    """Exit status of every task, in order."""

    def __init__(self, image: str, full_command: list[str], pipeline_root: str, runner: Any, env_vars: Any) -> None:
        self._command, self._variables = full_command, dict(env_vars or {})

    def run(self) -> Status:
        """Run the task; whatever is not 0 is a failure."""
        code, output = contain(IMAGE, self._command, Path.cwd(), self._variables)
        print(output)
        self.codes.append(code)
        return Status.SUCCESS if code == 0 else Status.FAILURE


@dsl.pipeline(name="first-steps")
def first_steps(recipe: str = "micro", overrides: dict = {}) -> None:  # noqa: B006 - as KFP wants it
    """From the recipe to the first stage of training."""
    form = {"data_uri": "", "model_name": "", "keep_ratio": 0.0, "target": ""}
    resolved = resolve(step="resolve", recipe=recipe, overrides=overrides, **form)
    slices = resolved.outputs["slices"]
    checked = preflight(step="preflight", slices=slices)
    samples = validate(step="validate", slices=slices).after(checked)
    start = initialize(step="initialize", slices=slices, samples=samples.outputs["samples"])
    train(step="train-1", slices=slices, model=start.outputs["model"], samples=samples.outputs["samples"])


def run_first_steps(place: Path, *, contained: bool, **arguments: Any) -> dict[str, Manifest]:
    """Run them in the current directory with store and run folder below `place`; the manifests by step.

    Raises:
        RuntimeError: KFP's word for a step that failed.
    """
    variables = named(store=place / "store", run=place / "runs/only", threads=1)
    runner = local.DockerRunner(environment=variables) if contained else local.SubprocessRunner(use_venv=False)
    with _open_to_all(), mock.patch.object(docker_task_handler, "DockerTaskHandler", InContainers):
        place.mkdir(exist_ok=True)
        local.init(runner=runner, pipeline_root=str(place / "kfp"), workspace_root=str(place / "workspace"))
        with mock.patch.dict(os.environ, variables):
            first_steps(**arguments)
    found = (next((place / "store" / step).glob("*/manifest.json")) for step in STEPS)
    return {step: Manifest.load(path) for step, path in zip(STEPS, found, strict=True)}


@contextmanager
def _open_to_all() -> Iterator[None]:
    """What this process makes can be written by the user of the container."""
    before = os.umask(0)
    try:
        yield
    finally:
        os.umask(before)
