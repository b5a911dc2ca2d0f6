"""Builds the image of the night test's pods and hands it to the test cluster's node.

python tests/night/images.py BASE       # its name is the last line
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import elsewhere  # noqa: F401
from stand_in import write_interpreter

from nvila.components.serve.interpreter import envoy
from nvila.infra.images import debian
from nvila.infra.images.build import SCRATCH
from nvila.infra.images.build import build as build_image
from nvila.infra.images.machine import podman_environment

STAND_IN = "localhost/nvila/stand-in:dev"
PYTHON = "/opt/nvila/bin/python"
"""Of the platform's images."""


def build(base: str) -> str:
    """The name of the image, which is made anew above `base`.

    Raises:
        subprocess.CalledProcessError: podman failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = write_interpreter(Path(folder, "stand-in"), binary := envoy(), PYTHON).parent
        (place / "envoy").unlink()
        shutil.copyfile(binary, place / "envoy")
        command = ["podman", "build", "--quiet", "--network", "none", "--build-arg", f"BASE_IMAGE={base}"]
        command += ["--file", str(Path(__file__).with_name("Containerfile")), "--tag", STAND_IN, folder]
        subprocess.run(command, check=True, env=podman_environment(SCRATCH), stdout=sys.stderr)
    return STAND_IN


def serve() -> str:
    """The name of the platform's image with vLLM, which is built, and handed to the node of the test cluster.

    Raises:
        NvilaError, subprocess.CalledProcessError: it could not be; what was run has said why.
    """
    name = build_image("serve", debian.make(), "localhost/nvila", "dev", [])
    subprocess.run([Path(os.environ["NVILA_KUBE_TOOLS"], "image.sh"), name], check=True)
    return name


if __name__ == "__main__":
    print(build(*sys.argv[1:]))
