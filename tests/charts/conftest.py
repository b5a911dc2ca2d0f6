"""A real API server for the chart, and places on it to install it; see places.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from places import PASSWORD, RELEASE, Cluster, Place, folder_of, values_for, variable, volume


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The API server, with every custom resource of the folder that it does not have yet."""
    found = Cluster(variable("KUBECONFIG"))
    folder = Path(variable("NVILA_CRDS"))
    there = found.kubectl("get", "crd", "--output", "name")
    for path in sorted(folder.glob("*.yaml")):
        group, _, plural = path.stem.partition("_")
        if f"/{plural}.{group}\n" in there:
            continue
        text = path.read_text(encoding="utf-8")
        if tools := os.environ.get("NVILA_KUBE_TOOLS"):
            command = [sys.executable, str(Path(tools) / "crd-downgrade.py"), str(path)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.kubectl("create", "--filename", "-", given=text)
        found.kubectl("wait", "--for", "condition=Established", f"crd/{plural}.{group}", "--timeout", "60s")
    return found


@pytest.fixture
def make_place(cluster: Cluster) -> Iterator[Callable[..., Place]]:
    """Makes places; what is in them is removed afterwards."""
    made: list[Place] = []

    def make(*more: str, images: bool = False) -> Place:
        # Not pytest's folder: the pods' users must be able to walk to it.
        folder = Path("/tmp") / f"nvila-chart-{uuid.uuid4().hex[:8]}"
        place = Place(cluster, folder.name, folder, {}, images, [f"{folder.name}-{name}" for name in more])
        folder.mkdir(mode=0o755)
        made.append(place)
        for name in (place.namespace, *place.extra):
            cluster.kubectl("create", "namespace", name)
            volume(place, name, "nvila", "ReadWriteMany", 65532)
        volume(place, place.namespace, "nvila-postgres", "ReadWriteOnce", 999)
        folder_of(folder / "cache", 65532)
        place.values.update(values_for(place))
        password = f"--from-literal=password={PASSWORD}"
        cluster.kubectl("create", "secret", "generic", "nvila-postgres", "-n", place.namespace, password)
        return place

    yield make
    for place in made:
        cluster.try_helm("uninstall", RELEASE, "--namespace", place.namespace)
        for name in (place.namespace, *place.extra):
            cluster.kubectl("delete", "namespace", name, "--wait=false", check=False)
            cluster.kubectl("delete", "pv", "--selector", f"nvila-test={name}", "--wait=false", check=False)
        shutil.rmtree(place.folder, ignore_errors=True)


@pytest.fixture
def running(make_place: Callable[..., Place]) -> Place:
    """A place in which pods run."""
    variable("NVILA_NODE_IMAGE")
    variable("NVILA_POSTGRES_IMAGE")
    return make_place(images=True)
