"""What all cells of the night test stand on: cluster, registry, a Gateway in front, and the resources' definitions."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import elsewhere  # noqa: F401
import images
from kube import ApiServer, install_crd
from places import connect as connect_with
from registry import Registry

from nvila.components.contracts.children import leashed
from nvila.components.contracts.environment import name_of
from nvila.components.kube.connect import connect
from nvila.components.kube.requests import Patience, Requests
from nvila.components.serve.ports import free_port
from nvila.infra.controller import crd

NEEDED = ("KUBECONFIG", "NVILA_CRDS", "NVILA_KUBE_TOOLS", "NVILA_NODE_IMAGE")
"""Variables, as `.ci/cluster` sets them."""


@dataclass(frozen=True)
class Ground:
    """Each cell adds a namespace and models of its own."""

    folder: Path
    """Readable for pods' users."""
    kubeconfig: Path
    admin: Requests
    server: ApiServer
    registry: Registry
    front: str
    """URL of the Gateway."""
    image: str
    """Of all pods, with the stand-in."""

    def serve_image(self) -> str:
        """The platform's own with vLLM, built and handed to the node now."""
        return images.serve()


@contextmanager
def prepared() -> Iterator[Ground]:
    """Everything runs as long as the context is open; the registry is this process' own, too."""
    kubeconfig, crds, tools, image = (os.environ[name] for name in NEEDED)
    admin, state = Requests(connect(kubeconfig), Patience.within(60)), Path(kubeconfig).parent
    with tempfile.TemporaryDirectory(prefix="nvila-night-", dir="/tmp") as made:
        folder = Path(made)
        folder.chmod(0o755)
        address = connect_with(kubeconfig, Path(crds)).address()
        install_crd(admin, crd.PATH)
        registry = Registry(folder, address)
        os.environ[name_of("mlflow_tracking_uri")] = registry.url
        place, port = folder / "gateway", free_port("127.0.0.1")
        place.mkdir()
        translator = [sys.executable, str(Path(__file__).with_name("translator.py")), str(place), str(port)]
        with (folder / "gateway.log").open("wb") as log:
            gateway = leashed(translator, stdout=log, stderr=log)
        try:
            registry.start()
            server = ApiServer(Path(tools), state)
            yield Ground(folder, Path(kubeconfig), admin, server, registry, f"http://127.0.0.1:{port}", image)
        finally:
            gateway.terminate()
            gateway.wait()
            registry.kill()
