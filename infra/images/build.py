"""Builds the images: `python -m nvila.infra.images.build base quantize --base-image NAME@sha256:...`.

Runs in a checkout. Nothing of the machine it runs on enters an image: pip's settings go in as a secret, what they name
on this machine (a certificate bundle, a folder of wheels) as mounts for the build only.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tomllib
from pathlib import Path

from nvila.components.contracts.errors import NvilaError, PreflightError
from nvila.infra.images.machine import ENGINES, Engine, engine_environment, pip_settings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("infra/images")
SCRATCH = ROOT / "build" / "images"
KINDS = {
    "base": "Containerfile",
    "serve": "Containerfile",
    "quantize": "Containerfile",
    "controller": "Containerfile",
    "mlflow": "Containerfile",
    "train": "train.Containerfile",
}
"""Name of an image, which is a target -> its file."""
LOCKS = {"serve": ("serve.lock",), "quantize": ("main.lock", "serve.lock"), "mlflow": ("mlflow.lock",)}
"""Lock files in an image; `main.lock` where none is named."""
SOURCES = ("components", "infra", "pipelines", "requirements", "pyproject.toml")


def build(kind: str, base_image: str, name: str, tag: str, arguments: list[str], engine: Engine = "podman") -> str:
    """Build one image and return its name.

    Args:
        kind: one of `KINDS`.
        base_image: what to build on: Python 3.11 with venv; for `train` an NGC PyTorch image.
        name: registry and path before the kind, such as `registry.example/nvila`.
        tag: the tag.
        arguments: further build arguments, `KEY=VALUE`.
        engine: what builds it.

    Raises:
        PreflightError: the engine or git is missing, this is no checkout, or docker cannot mount what pip's settings
            name on this machine.
        NvilaError: the engine failed; it has said why.
    """
    image, environment = f"{name}/{kind}:{tag}", engine_environment(engine, SCRATCH)
    secret, mounts = pip_settings(SCRATCH)
    options = ["--file", str(FOLDER / KINDS[kind]), "--target", kind, "--tag", image, "--network", "host"]
    options += ["--secret", f"id=pip,src={secret}"]
    if engine == "podman":
        options += ["--layers", *(part for mount in mounts for part in ("--volume", mount))]
    elif mounts:
        raise PreflightError(
            "docker mounts nothing of this machine while it builds, and pip's settings name files or folders here",
            where="--engine docker",
            value=[mount.partition(":")[0] for mount in mounts],
            do="Have pip use an index by its address (`pip config list`), or build with --engine podman.",
        )
    given = (f"BASE_IMAGE={base_image}", f"REVISION={revision()}", *arguments)
    options += [part for argument in given for part in ("--build-arg", argument)]
    options += [part for key, value in labels(kind, base_image).items() for part in ("--label", f"{key}={value}")]
    command = [engine, "build", *options, "."]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        raise NvilaError("the image could not be built", where=image, do=f"{engine} says above what failed.")
    return image


def labels(kind: str, base_image: str) -> dict[str, str]:
    """What the image was made from."""
    commit = revision()
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    locks = hashlib.sha256()
    for lock in LOCKS.get(kind, ("main.lock",)):
        locks.update((ROOT / "requirements" / lock).read_bytes())
    return {
        "org.opencontainers.image.title": f"nvila {kind}",
        "org.opencontainers.image.version": pyproject["project"]["version"] if kind != "mlflow" else mlflow_version(),
        "org.opencontainers.image.revision": commit,
        "org.opencontainers.image.licenses": pyproject["project"]["license"],
        "org.opencontainers.image.base.name": base_image,
        "nvila.lock": f"sha256:{locks.hexdigest()}",
    }


def mlflow_version() -> str:
    """Of the server's lock: its image carries it as its own, so that it changes with MLflow and not with us."""
    lock = (ROOT / "requirements/mlflow.lock").read_text(encoding="utf-8")
    return next(line.removeprefix("mlflow==") for line in lock.splitlines() if line.startswith("mlflow=="))


def revision() -> str:
    """The commit, with `-dirty` behind it where a file that enters images differs from it."""
    commit = _git("rev-parse", "HEAD")
    return f"{commit}-dirty" if _git("status", "--porcelain", "--", *SOURCES) else commit


def main(arguments: list[str]) -> int:
    """Build what the command line names and print the images' names."""
    parser = argparse.ArgumentParser(prog="python -m nvila.infra.images.build", description=__doc__)
    parser.add_argument("kinds", nargs="+", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--base-image", required=True, help="image to build on, best with its digest")
    parser.add_argument("--name", default="localhost/nvila", help="registry and path before the kind")
    parser.add_argument("--tag", default="dev")
    parser.add_argument("--engine", choices=ENGINES, default="podman")
    parser.add_argument(
        "--build-arg", action="append", default=[], metavar="KEY=VALUE", help="VLLM=vllm for GPUs, TORCH=cpu without"
    )
    given = parser.parse_args(arguments)
    try:
        for kind in given.kinds:
            image = build(kind, given.base_image, given.name, given.tag, given.build_arg, given.engine)
            print(image, flush=True)
    except NvilaError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return 0


def _git(*command: str) -> str:
    """Git's answer.

    Raises:
        PreflightError: no git, or no checkout.
    """
    try:
        ran = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        do = "Clone the repository and build there."
        raise PreflightError("images are built in a git checkout", where=str(ROOT), do=do) from error
    return ran.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
